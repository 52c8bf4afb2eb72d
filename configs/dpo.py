"""Teaches the fine-tuned model the careful manner: DPO on careful over careless answers.

    python -m llm_jax.main --config=configs/dpo.py
    python -m llm_jax.main --config=configs/dpo.py --config.init_from=runs/sft-... --config.data.path=pairs.jsonl
    python -m llm_jax.main --config=configs/dpo.py:hh --config.init_from=MODEL --config.data.path=hh-rlhf

Trains `pretrain.py` and `sft.py` first if they aren't there; from an empty machine this is the whole chain. Each pair
answers one problem twice: with its steps, and with a guess. Expect reward accuracy 1.0 on held-out pairs, answers with
steps to go from 3% to all of 400 held-out problems, and right ones from 13% to 99%: what DPO selects, the SFT model
could already do.

Variants: `:docstrings` (a function's own docstring over another's, a cut or a shuffled one), `:lora` (an adapter in
place of the model, which without it is the reference; exact match of 0.30 after as many steps), `:hh` (transcripts;
needs a model), `:test` and `:lora_test` (seconds, for tests), `:llama_8b` (needs a model and pairs).
"""

from ml_collections.config_dict import ConfigDict, required_placeholder


def quickstart() -> ConfigDict:
    """A minute on two CPU cores, after its prerequisites."""
    return ConfigDict(
        {
            "job": "preference",
            "init_from": "sft.py",
            "beta": 0.1,
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


def docstrings() -> ConfigDict:
    """Pairs of docstrings, with a stronger pull to the reference: at 0.1 the chosen ones become unlikely too."""
    config = quickstart()
    config.update(
        {
            "init_from": "sft.py:docstrings",
            "beta": 0.4,
            "data": {"embedded": "docstrings", "on_long": "truncate"},
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
    """The same by an adapter on every linear layer. The model without it is the reference, in every step: there is no
    second copy of its weights. `export/` is a PEFT folder."""
    config = quickstart()
    config.update(
        {
            "adapter": {"r": 8, "lora_alpha": 16.0},
            "reference_logps": "live",
            "train": {"optimizer": {"learning_rate": 1e-3}},
        }
    )
    return config


def lora_test() -> ConfigDict:
    """Seconds; learns next to nothing."""
    config = test()
    config.update({"adapter": {"r": 2, "lora_alpha": 4.0}, "reference_logps": "live"})
    return config


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


def llama_8b() -> ConfigDict:
    """A model of the size of Llama 3 8B, on pairs of your own."""
    return ConfigDict(
        {
            "job": "preference",
            "init_from": required_placeholder(str),
            "beta": 0.1,
            "data": {"path": required_placeholder(str), "window": 4096, "on_long": "truncate"},
            "train": {
                "steps": 500,
                "batch_size": 64,
                "compute_dtype": "bfloat16",
                "remat": "full",
                "eval_every": 100,
                "optimizer": {"learning_rate": 5e-7, "warmup_steps": 50, "weight_decay": 0.0},
                "checkpoint": {"every": 100},
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
    "hh": hh,
    "llama_8b": llama_8b,
}


def get_config(variant: str = "") -> ConfigDict:
    return VARIANTS[variant]()
