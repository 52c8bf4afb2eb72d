"""Teaches answering and the careful manner at once, without a reference: ORPO on careful over careless answers.

    python -m llm_jax.main --config=configs/orpo.py
    python -m llm_jax.main --config=configs/orpo.py:hh --config.init_from=MODEL --config.data.path=hh-rlhf

Starts from the base model, without `sft.py`: the careful answers' likelihood is part of the loss. Expect every answer
in steps, and exact match on 400 held-out problems of 0.00 before and 0.19 after.

Variants: `:hh` (transcripts; needs a model), `:test` (seconds, for tests).
"""

from ml_collections.config_dict import ConfigDict, required_placeholder


def quickstart() -> ConfigDict:
    """Three minutes on two CPU cores, after its prerequisite."""
    return ConfigDict(
        {
            "job": "preference",
            "init_from": "pretrain.py",
            "loss_type": "orpo",
            "beta": 0.1,
            "reference_logps": "none",
            "data": {"window": 512, "generated": {"records": 8000}},
            "train": {
                "steps": 400,
                "batch_size": 8,
                "eval_every": 200,
                "optimizer": {"learning_rate": 1e-3, "warmup_steps": 8, "weight_decay": 0.0},
                "checkpoint": {"every": 200},
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
            "train": {"steps": 500, "batch_size": 16, "eval_every": 100, "optimizer": {"learning_rate": 5e-6}},
        }
    )
    return config


def test() -> ConfigDict:
    """Seconds; learns next to nothing."""
    config = quickstart()
    config.update(
        {
            "init_from": "pretrain.py:test",
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
