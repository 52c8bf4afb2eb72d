"""SPPO: regresses each answer's log-ratio on how likely the answer is to beat the policy that gave it.

    python -m llm_jax.main --config=configs/sppo.py
    python -m llm_jax.main --config=configs/sppo.py:gsm8k --config.init_from=MODEL --config.data.path=FILE

Self-play preference optimization in the form of Wu et al. 2024 (arXiv:2405.00675): of five answers to each problem the
one that wins most and the one that wins least, each with its estimated probability to beat the policy (the mean over
all five, itself with 1/2 among them); the policy of a round's start is the reference. Trains `pretrain.py` and `sft.py`
first if they aren't there.

Variants: `:gsm8k` (`question` and `answer` of a file, and the paper's beta of 0.001; needs a model), `:test` (seconds,
for tests).
"""

from ml_collections.config_dict import ConfigDict, required_placeholder


def quickstart() -> ConfigDict:
    """Minutes on two CPU cores, after its prerequisites."""
    return ConfigDict(
        {
            "job": "rounds",
            "init_from": "sft.py",
            "method": "sppo",
            "rounds": 3,
            "prompts_per_round": 512,
            "sampling": {"n": 5, "max_tokens": 64},
            "scorer": {"win_probability": "compare"},
            "data": {"window": 512},
            "preference": {
                "loss_type": "sppo",
                "beta": 0.02,
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
                "beta": 1e-3,
                "train": {
                    "steps": 150,
                    "batch_size": 32,
                    "compute_dtype": "bfloat16",
                    "remat": "full",
                    "optimizer": {"learning_rate": 5e-7, "warmup_steps": 15},
                },
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
