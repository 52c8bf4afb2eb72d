"""SPO, preference form: of eight answers the one that wins most against the others over the one that wins least.

    python -m llm_jax.main --config=configs/spo.py
    python -m llm_jax.main --config=configs/spo.py:gsm8k --config.init_from=MODEL --config.data.path=FILE

Self-play preference optimization (Swamy et al. 2024, arXiv:2401.04056): the reward of an answer is how often it is
preferred to the policy's other answers to the same problem, so that no scale of goodness has to exist. A pair's DPO
loss is weighted by the difference of its two rewards; the policy of a round's start is its reference. Here right
answers win against wrong ones; `--config.scorer.kind=function --config.scorer.pairwise=true
--config.scorer.function=MODULE.NAME` takes any judge of two answers. Trains `pretrain.py` and `sft.py` first.

Variants: `:gsm8k` (`question` and `answer` of a file; needs a model), `:test` (seconds, for tests).
"""

from ml_collections.config_dict import ConfigDict, required_placeholder


def quickstart() -> ConfigDict:
    """Minutes on two CPU cores, after its prerequisites."""
    return ConfigDict(
        {
            "job": "rounds",
            "init_from": "sft.py",
            "method": "spo",
            "rounds": 3,
            "prompts_per_round": 512,
            "sampling": {"n": 8, "max_tokens": 64},
            "scorer": {"win_probability": "compare"},
            "data": {"window": 512},
            "preference": {
                "beta": 0.1,
                "train": {
                    "steps": 40,
                    "batch_size": 8,
                    "optimizer": {"learning_rate": 3e-5, "warmup_steps": 4, "weight_decay": 0.0},
                    "checkpoint": {"every": 20},
                },
            },
            "task_eval": {"max_tokens": 64},
            # Batches this small have nothing to gain from more devices.
            "mesh": {"data": 1},
        }
    )


def gsm8k() -> ConfigDict:
    """A model of your own on the problems of GSM8K, or of any file of that form."""
    config = quickstart()
    config.update(
        {
            "init_from": required_placeholder(str),
            "prompts_per_round": None,
            "sampling": {"max_tokens": 320},
            "data": {"path": required_placeholder(str), "window": 1024, "on_long": "drop"},
            "preference": {
                "train": {
                    "steps": 150,
                    "batch_size": 32,
                    "compute_dtype": "bfloat16",
                    "remat": "full",
                    "optimizer": {"learning_rate": 5e-7, "warmup_steps": 15},
                }
            },
            "task_eval": {"max_tokens": 320},
            "mesh": {"data": -1, "zero": 3},
        }
    )
    return config


def test() -> ConfigDict:
    """Seconds; learns next to nothing. The policy knows no answer, so the judge prefers shorter ones."""
    config = quickstart()
    judge = {"kind": "function", "function": "llm_jax.jobs.alignment.rewards.shorter", "pairwise": True}
    config.update(
        {
            "init_from": "sft.py:test",
            "rounds": 2,
            "prompts_per_round": 4,
            "chunk": 2,
            "sampling": {"n": 3, "max_tokens": 8},
            "scorer": {**judge, "win_probability": "sigmoid"},
            "pairs": {"truncated": "keep"},
            "data": {"generated": {"records": 8, "eval_records": 4}},
            "preference": {
                "train": {
                    "steps": 3,
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
