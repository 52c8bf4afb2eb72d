"""A base model of about a million parameters, from text and word problems.

    python -m llm_jax.main --config=configs/pretrain.py
    python -m llm_jax.main --config=configs/pretrain.py --config.data.path=my_texts/

Trains a byte-level BPE and a small Llama from random weights on data that needs no download: the standard library's
sources and docstrings, mixed with generated stories and equations. Expect 1.52 nats per byte of held-out text, where an
interpolated bigram model needs 1.62 and a unigram model 2.33 (the report has all three), and no right answers among 400
held-out problems: nothing has shown it questions.

Variants: `:experts` (a Mixtral: 8 experts of half the width, two per token), `:mamba2`, `:hybrid` (a Jamba: Mamba,
attention and experts), all within a tenth of the default's work per token; `:prefix_lm` (reads a first part of each
text from both sides and learns to go on); `:test` and `:experts_test`, `:mamba2_test`, `:hybrid_test`,
`:prefix_lm_test` (seconds, for tests); `:llama_8b` (the shapes of Llama 3 8B; needs a tokenizer and texts).
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


def of_kind(name: str, base: ConfigDict) -> ConfigDict:
    """The same run of another kind of model, of the same width."""
    model = base.to_dict()["model"]
    width, inner, layers = model["hidden_size"], model["intermediate_size"], model["num_layers"]
    # For the fields of attention and feed-forward layers that such a model has not.
    without = {"positions": "none", "num_heads": 1, "num_kv_heads": None, "intermediate_size": 1}
    kinds = {
        "experts": {
            "family": "mixtral",
            "intermediate_size": inner // 2,
            "experts": {"num": 8, "top_k": 2},
        },
        "mamba2": {
            **without,
            "family": "mamba2",
            "num_layers": 3 * layers // 2,
            "max_position_embeddings": 2**20,
            "mixers": ("mamba2",) * (3 * layers // 2),
            "feed_forwards": ("none",) * (3 * layers // 2),
            "mamba": {"inner_size": 2 * width, "state_size": width // 2, "num_heads": width // 16},
        },
        "hybrid": {
            "family": "jamba",
            "positions": "none",
            "intermediate_size": inner // 2,
            "mixers": ("mamba", "attention") * (layers // 2),
            "feed_forwards": ("dense", "experts") * (layers // 2),
            "mamba": {
                "inner_size": 2 * width,
                "state_size": 16,
                "dt_rank": width // 16,
                "selection_norm": "weighted",
            },
            "experts": {"num": 4, "top_k": 2, "normalize": False},
        },
    }
    base.update({"model": kinds[name]})
    if "experts" in kinds[name]:
        base.update({"train": {"balancing": {"load_balance": 0.01}}})
    return base


def prefix_lm(base: ConfigDict) -> ConfigDict:
    """The same model, whose texts begin with a part that is read and not predicted."""
    base.update({"model": {"family": "llm_jax", "prefix_lm": True}, "data": {"random_prefix": True}})
    return base


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


VARIANTS = {
    "": quickstart,
    "quickstart": quickstart,
    "experts": lambda: of_kind("experts", quickstart()),
    "mamba2": lambda: of_kind("mamba2", quickstart()),
    "hybrid": lambda: of_kind("hybrid", quickstart()),
    "prefix_lm": lambda: prefix_lm(quickstart()),
    "test": test,
    "experts_test": lambda: of_kind("experts", test()),
    "mamba2_test": lambda: of_kind("mamba2", test()),
    "hybrid_test": lambda: of_kind("hybrid", test()),
    "prefix_lm_test": lambda: prefix_lm(test()),
    "llama_8b": llama_8b,
}


def get_config(variant: str = "") -> ConfigDict:
    return VARIANTS[variant]()
