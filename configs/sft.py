"""Fine-tunes the base model on answers to word problems, by careful and by careless writers.

    python -m llm_jax.main --config=configs/sft.py
    python -m llm_jax.main --config=configs/sft.py --config.data.path=mine.jsonl --config.init_from=path/to/hf/folder

Trains `pretrain.py` first if it isn't there. 45% of the demonstrations write their steps and are right, 55% guess.
Expect 14% of 400 held-out problems to be answered rightly. Decoded greedily, the model takes the commoner manner nearly
always: 3% of its answers show their steps.

Variants: `:docstrings` (a function's docstring from its signature), `:test` (seconds, for tests), `:llama_8b` (needs a
model and records).
"""

from ml_collections.config_dict import ConfigDict, required_placeholder


def quickstart() -> ConfigDict:
    """Minutes on two CPU cores."""
    return ConfigDict(
        {
            "job": "sft",
            "init_from": "pretrain.py",
            "data": {"window": 256},
            "train": {
                "steps": 1000,
                "batch_size": 4,
                "eval_every": 500,
                "optimizer": {"learning_rate": 2e-3, "warmup_steps": 40},
                "checkpoint": {"every": 250},
            },
            "mesh": {"data": 1},
        }
    )


def docstrings() -> ConfigDict:
    """Signature in, docstring out: real text, with no answer to check."""
    config = quickstart()
    config.update(
        {
            "data": {"embedded": "docstrings", "on_long": "truncate"},
            "train": {"steps": 400},
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
                "batch_size": 8,
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


def lora() -> ConfigDict:
    """The same by an adapter on every linear layer; the model stays as it is. `export/` is a PEFT folder."""
    config = quickstart()
    config.update(
        {
            "adapter": {"r": 8, "lora_alpha": 16.0},
            "train": {"optimizer": {"weight_decay": 0.0}},
        }
    )
    return config


def lora_test() -> ConfigDict:
    """Seconds; learns next to nothing."""
    config = test()
    config.update({"adapter": {"r": 2, "lora_alpha": 4.0, "lora_dropout": 0.1}})
    return config


def llama_8b() -> ConfigDict:
    """A model of the size of Llama 3 8B, on records of your own."""
    return ConfigDict(
        {
            "job": "sft",
            "init_from": required_placeholder(str),
            "data": {"path": required_placeholder(str), "window": 4096, "on_long": "truncate"},
            "train": {
                "steps": 1000,
                "batch_size": 64,
                "compute_dtype": "bfloat16",
                "remat": "full",
                "eval_every": 200,
                "optimizer": {"learning_rate": 1e-5, "warmup_steps": 30, "weight_decay": 0.0},
                "checkpoint": {"every": 200},
            },
            "mesh": {"zero": 3},
        }
    )


VARIANTS = {
    "": quickstart,
    "quickstart": quickstart,
    "docstrings": docstrings,
    "test": test,
    "lora": lora,
    "lora_test": lora_test,
    "llama_8b": llama_8b,
}


def get_config(variant: str = "") -> ConfigDict:
    return VARIANTS[variant]()
