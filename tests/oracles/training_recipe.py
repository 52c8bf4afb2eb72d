"""The model, the batches and the fields of the training run that tests/golden/training.json records. NumPy only."""

from collections.abc import Callable

import numpy as np

STEPS, BATCH, LENGTH, SEED = 200, 8, 24, 11
CONFIG = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
OPTIMIZER = {
    "learning_rate": 3e-3,
    "beta1": 0.9,
    "beta2": 0.95,
    "eps": 1e-8,
    "weight_decay": 0.1,
    "clip_norm": 1.0,
    "schedule": "cosine",
    "warmup_steps": 20,
}


def shapes() -> dict[str, tuple[int, ...]]:
    """Hugging Face tensor names and shapes."""
    D, F, V, H = (CONFIG[name] for name in ("hidden_size", "intermediate_size", "vocab_size", "head_dim"))
    N, K = CONFIG["num_attention_heads"] * H, CONFIG["num_key_value_heads"] * H
    out = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,), "lm_head.weight": (V, D)}
    for i in range(CONFIG["num_hidden_layers"]):
        layer = {
            "self_attn.q_proj": (N, D),
            "self_attn.k_proj": (K, D),
            "self_attn.v_proj": (K, D),
            "self_attn.o_proj": (D, N),
            "mlp.gate_proj": (F, D),
            "mlp.up_proj": (F, D),
            "mlp.down_proj": (D, F),
            "input_layernorm": (D,),
            "post_attention_layernorm": (D,),
        }
        out |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return out


def weights(draw: Callable[..., np.ndarray]) -> dict[str, np.ndarray]:
    """float32 tensors under their Hugging Face names, of `recipe.draw` (scripts and tests import it differently)."""
    return {name: draw(name, shape, SEED) for name, shape in shapes().items()}


def batch(step: int) -> np.ndarray:
    """int32[BATCH, LENGTH]: walks x -> 5 x + 7 mod V with a random step one time in six, so that there is something
    to learn and something that cannot be."""
    random = np.random.RandomState(1000 + step)
    tokens = np.empty((BATCH, LENGTH), np.int32)
    tokens[:, 0] = np.floor(random.random_sample(BATCH) * CONFIG["vocab_size"])
    jump = random.random_sample((BATCH, LENGTH)) < 1 / 6
    anywhere = np.floor(random.random_sample((BATCH, LENGTH)) * CONFIG["vocab_size"]).astype(np.int32)
    for t in range(1, LENGTH):
        tokens[:, t] = np.where(jump[:, t], anywhere[:, t], (5 * tokens[:, t - 1] + 7) % CONFIG["vocab_size"])
    return tokens
