"""Teaches the careful manner up to a margin: IPO on careful over careless answers.

    python -m llm_jax.main --config=configs/ipo.py
    python -m llm_jax.main --config=configs/ipo.py:hh --config.init_from=MODEL --config.data.path=hh-rlhf

As `dpo.py`, but the difference of log-ratios per token is drawn to 1 / (2 beta) = 1 and not beyond: certain preferences
are not followed for ever. Expect exact match on 400 held-out problems of 0.13 before and 0.995 after, as with DPO.

Variants: `:hh` (transcripts; needs a model), `:test` (seconds, for tests).
"""

from ml_collections.config_dict import ConfigDict, required_placeholder


def quickstart() -> ConfigDict:
    """A minute on two CPU cores, after its prerequisites."""
    return ConfigDict(
        {
            "job": "preference",
            "init_from": "sft.py",
            "loss_type": "ipo",
            "beta": 0.5,
            "data": {"window": 512, "generated": {"records": 3000}},
            "train": {
                "steps": 80,
                "batch_size": 8,
                "eval_every": 40,
                "optimizer": {"learning_rate": 3e-5, "warmup_steps": 8, "weight_decay": 0.0},
                "checkpoint": {"every": 40},
            },
            "mesh": {"data": 1},
        }
    )


def hh() -> ConfigDict:
    """hh-rlhf's transcripts, or other pairs, for a model of your own."""
    config = quickstart()
    config.update(
        {
            "init_from": required_placeholder(str),
            "data": {"path": required_placeholder(str), "window": 1024, "on_long": "drop"},
            "train": {"steps": 500, "batch_size": 16, "eval_every": 100, "optimizer": {"learning_rate": 1e-6}},
        }
    )
    return config


def test() -> ConfigDict:
    """Seconds; learns next to nothing."""
    config = quickstart()
    config.update(
        {
            "init_from": "sft.py:test",
            "data": {"generated": {"records": 100, "eval_records": 16}},
            "train": {
                "steps": 4,
                "log_every": 2,
                "eval_every": 2,
                "eval_batches": 2,
                "optimizer": {"warmup_steps": 1},
                "checkpoint": {"every": 2},
            },
            "mesh": {"data": -1},
            "task_eval": {"problems": 4, "max_tokens": 16, "samples": 2},
        }
    )
    return config


VARIANTS = {"": quickstart, "quickstart": quickstart, "hh": hh, "test": test}


def get_config(variant: str = "") -> ConfigDict:
    return VARIANTS[variant]()
