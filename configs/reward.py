"""Teaches the fine-tuned model to tell good answers from bad ones: a reward model, from pairs.

    python -m llm_jax.main --config=configs/reward.py
    python -m llm_jax.main --config=configs/reward.py:hh --config.data.path=harmless-base.jsonl.gz
    python -m llm_jax.score runs/reward-... --input=answers.jsonl --output=scored.jsonl

Trains `pretrain.py` and `sft.py` first if they aren't there.

Variants: `:pairwise` (a model that reads both answers), `:classify` (careful or careless, a class of each answer),
`:steps` (a process reward model: each equation right or wrong), `:lora` (an adapter and the scores' projection in place
of the model), `:hh` (Anthropic's harmlessness pairs), `:harmless` (the same, each answer harmless or harmful), and
`:test`, `:test_pairwise`, `:test_classify`, `:test_steps`, `:lora_test` (seconds).
"""

from ml_collections.config_dict import ConfigDict, required_placeholder


def quickstart() -> ConfigDict:
    """Minutes on two CPU cores, after its prerequisites."""
    return ConfigDict(
        {
            "job": "reward",
            "init_from": "sft.py",
            "center_rewards_coefficient": 0.01,
            "data": {"window": 512, "generated": {"records": 3000}},
            "train": {
                "steps": 80,
                "batch_size": 8,
                "eval_every": 40,
                "optimizer": {"learning_rate": 1e-4, "warmup_steps": 8, "weight_decay": 0.0},
                "checkpoint": {"every": 40},
            },
            "mesh": {"data": 1},
        }
    )


def pairwise() -> ConfigDict:
    """P(one answer over the other | prompt), of both at once: what SPO and other games need."""
    config = quickstart()
    config.update({"pairwise": True, "data": {"window": 1024}})
    del config.center_rewards_coefficient
    return config


def classify() -> ConfigDict:
    """Two classes of answers."""
    config = quickstart()
    config.update({"task": "classify", "label_names": ("careless", "careful")})
    del config.center_rewards_coefficient
    return config


def steps() -> ConfigDict:
    """A process reward model."""
    config = quickstart()
    config.update({"task": "steps", "label_names": ("wrong", "right"), "train": {"steps": 300}})
    del config.center_rewards_coefficient
    return config


def lora() -> ConfigDict:
    """The same by an adapter on every linear layer; `export/` is a PEFT folder of the task type SEQ_CLS."""
    config = quickstart()
    config.update({"adapter": {"r": 8, "lora_alpha": 16.0}, "train": {"optimizer": {"learning_rate": 1e-3}}})
    return config


def lora_test() -> ConfigDict:
    """Seconds; learns next to nothing."""
    config = short(quickstart())
    config.update({"adapter": {"r": 2, "lora_alpha": 4.0}})
    return config


def hh() -> ConfigDict:
    """HH-RLHF's pairs (`chosen` and `rejected` transcripts): needs a file of them, and any model.

    2,000 pairs of `harmless-base`, from the quickstart's base model of a million parameters (two minutes on one core):
    held-out accuracy 0.544 of 320 pairs, 95% interval 0.489 to 0.597; four times as many steps 0.569, 0.514 to 0.622.
    """
    config = quickstart()
    config.update(
        {
            "init_from": "pretrain.py",  # sft.py's model knows word problems alone: 10 nats a token of transcripts
            "data": {
                "path": required_placeholder(str),
                "window": 1024,
                "on_long": "drop",
                "eval_fraction": 0.2,
            },
            "train": {
                "steps": 120,
                "batch_size": 4,
                "eval_batches": 1000,
                "optimizer": {"learning_rate": 3e-4, "warmup_steps": 10},
            },
        }
    )
    return config


def harmless() -> ConfigDict:
    """The same pairs taken apart: is an answer the harmless one (1) or the harmful one (0)?

    Harder than pairs: from the same model 80 steps leave it at chance, 0.495 of 747 held-out answers (0.460 to 0.531),
    where a logistic regression on their words is right on 0.56.
    """
    config = hh()
    config.update({"task": "classify", "label_names": ("harmful", "harmless"), "data": {"unpair": True}})
    del config.center_rewards_coefficient
    return config


def short(config: ConfigDict) -> ConfigDict:
    """Seconds; learns next to nothing."""
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
        }
    )
    return config


VARIANTS = {
    "": quickstart,
    "quickstart": quickstart,
    "pairwise": pairwise,
    "classify": classify,
    "steps": steps,
    "lora": lora,
    "hh": hh,
    "harmless": harmless,
    "test": lambda: short(quickstart()),
    "test_pairwise": lambda: short(pairwise()),
    "test_classify": lambda: short(classify()),
    "test_steps": lambda: short(steps()),
    "lora_test": lora_test,
}


def get_config(variant: str = "") -> ConfigDict:
    return VARIANTS[variant]()
