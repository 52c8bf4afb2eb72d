"""A base model of about a million parameters, from text and word problems.

    python -m llm_jax.main --config=configs/pretrain.py
    python -m llm_jax.main --config=configs/pretrain.py --config.data.path=my_texts/

Trains a byte-level BPE and a small Llama from random weights on data that needs no download: the standard library's
sources and docstrings, mixed with generated stories and equations. Expect 1.52 nats per byte of held-out text, where an
interpolated bigram model needs 1.62 and a unigram model 2.33 (the report has all three), and no right answers among 400
held-out problems: nothing has shown it questions.

Variants: `:test` (seconds, for tests), `:llama_8b` (the shapes of Llama 3 8B; needs a tokenizer and texts).
"""

from ml_collections.config_dict import ConfigDict, required_placeholder


def quickstart() -> ConfigDict:
    """Minutes on two CPU cores."""
    return ConfigDict(
        {
            "job": "pretrain",
            "model": {
                "hidden_size": 128,
                "intermediate_size": 384,
                "num_layers": 4,
                "num_heads": 4,
                "num_kv_heads": 2,
                "max_position_embeddings": 1024,
                "tie_embeddings": True,
                # With tied embeddings drawn at 0.02 so small a model learns far slower.
                "embed_init_std": 0.1,
            },
            "tokenizer": {"vocab_size": 2048},
            "data": {"window": 256},
            "train": {
                "steps": 1200,
                "batch_size": 4,
                "eval_every": 600,
                "optimizer": {"learning_rate": 4e-3, "warmup_steps": 40, "final_fraction": 0.1},
                "checkpoint": {"every": 300},
            },
            # Batches this small have nothing to gain from more devices.
            "mesh": {"data": 1},
        }
    )


def test() -> ConfigDict:
    """Seconds; learns next to nothing."""
    config = quickstart()
    config.update(
        {
            "model": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_layers": 2,
                "num_heads": 2,
                "num_kv_heads": 1,
            },
            "tokenizer": {"vocab_size": 384},
            "data": {"generated": {"records": 200, "eval_records": 32}},
            "train": {
                "steps": 6,
                "batch_size": 8,
                "log_every": 2,
                "eval_every": 3,
                "eval_batches": 2,
                "optimizer": {"warmup_steps": 2},
                "checkpoint": {"every": 3},
            },
            "mesh": {"data": -1},
        }
    )
    return config


def llama_8b() -> ConfigDict:
    """Llama 3 8B (Grattafiori et al. 2024, table 3), masters and optimizer state sharded over all devices."""
    return ConfigDict(
        {
            "job": "pretrain",
            "model": {
                "vocab_size": 128256,
                "hidden_size": 4096,
                "intermediate_size": 14336,
                "num_layers": 32,
                "num_heads": 32,
                "num_kv_heads": 8,
                "max_position_embeddings": 8192,
                "rope_theta": 500000.0,
            },
            "tokenizer": {"path": required_placeholder(str)},
            "data": {"path": required_placeholder(str), "window": 8192},
            "train": {
                "steps": 100_000,
                "batch_size": 512,
                "compute_dtype": "bfloat16",
                "remat": "full",
                "eval_every": 1000,
                "optimizer": {"learning_rate": 3e-4, "warmup_steps": 2000, "final_fraction": 0.1},
                "checkpoint": {"every": 1000},
            },
            "mesh": {"zero": 3},
        }
    )


VARIANTS = {"": quickstart, "quickstart": quickstart, "test": test, "llama_8b": llama_8b}


def get_config(variant: str = "") -> ConfigDict:
    return VARIANTS[variant]()
