"""Answers of the aligned model to held-out word problems, checked one by one.

    python -m llm_jax.main --config=configs/generate.py
    python -m llm_jax.main --config=configs/generate.py --config.init_from=path/to/hf/folder --config.prompts=mine.jsonl

Trains `pretrain.py`, `sft.py` and `dpo.py` first if they aren't there. `samples.jsonl` in the run's folder has a line
per answer, with whether it is right. Expect about 99% of 128 greedy answers to be right, in seconds on two CPU cores
once the model is there.

Variants: `:sampled` (four answers to each problem at temperature 1, with log-probabilities), `:test` (seconds, for
tests).
"""

from ml_collections.config_dict import ConfigDict


def greedy() -> ConfigDict:
    return ConfigDict(
        {
            "job": "generate",
            "init_from": "dpo.py",
            "max_prompts": 128,
            "sampling": {"temperature": 0.0},
            "mesh": {"data": 1},
        }
    )


def sampled() -> ConfigDict:
    """How often the model is right when it is not asked for its best guess; each problem is prefilled once."""
    config = greedy()
    config.update({"max_prompts": 32, "sampling": {"temperature": 1.0, "n": 4, "logprobs": 3}})
    return config


def test() -> ConfigDict:
    """Seconds; the model knows next to nothing."""
    config = sampled()
    config.update({"init_from": "pretrain.py:test", "max_prompts": 3, "batch_size": 2})
    config.update({"sampling": {"max_tokens": 8, "n": 2}})
    return config


VARIANTS = {"": greedy, "greedy": greedy, "sampled": sampled, "test": test}


def get_config(variant: str = "") -> ConfigDict:
    return VARIANTS[variant]()
