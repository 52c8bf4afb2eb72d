"""The tiny state-space mixers of the golden files: configs, weights and inputs from seeds. NumPy only."""

import zlib

import numpy as np

HIDDEN, BATCH, LENGTH = 24, 2, 37
ONE = {"state_size": 5, "conv_kernel": 4, "expand": 2, "time_step_rank": 3, "hidden_size": HIDDEN}
TWO = {"mamba_d_state": 5, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_n_heads": 6, "hidden_size": HIDDEN}
CASES = {
    "mamba": ("mamba", {**ONE}),
    "mamba_options": (
        "mamba",
        {**ONE, "use_bias": True, "use_conv_bias": False, "hidden_act": "gelu", "conv_kernel": 3, "expand": 3},
    ),
    "falcon_mamba": ("falcon_mamba", {**ONE, "mixer_rms_eps": 1e-2}),
    "falcon_mamba_options": ("falcon_mamba", {**ONE, "use_bias": True, "time_step_rank": 1, "conv_kernel": 2}),
    "jamba": (
        "jamba",
        {"mamba_d_state": 5, "mamba_dt_rank": 3, "mamba_expand": 2, "rms_norm_eps": 1e-3, "hidden_size": HIDDEN},
    ),
    "jamba_options": (
        "jamba",
        {"mamba_d_state": 4, "mamba_d_conv": 3, "mamba_dt_rank": 2, "hidden_size": HIDDEN, "mamba_proj_bias": True,
         "mamba_conv_bias": False},
    ),
    "mamba2": (
        "mamba2",
        {"num_heads": 6, "head_dim": 8, "state_size": 5, "n_groups": 2, "chunk_size": 16, "hidden_size": HIDDEN},
    ),
    "mamba2_options": (
        "mamba2",
        {"num_heads": 4, "head_dim": 12, "state_size": 5, "n_groups": 1, "chunk_size": 8, "hidden_size": HIDDEN,
         "use_bias": True, "use_conv_bias": False, "conv_kernel": 3, "hidden_act": "relu",
         "time_step_limit": (0.3, 0.9), "layer_norm_epsilon": 1e-2},
    ),
    "bamba": ("bamba", {**TWO, "mamba_n_groups": 2, "mamba_chunk_size": 16, "rms_norm_eps": 1e-3}),
    "granitemoehybrid": (
        "granitemoehybrid",
        {**TWO, "mamba_n_groups": 3, "mamba_chunk_size": 16, "mamba_proj_bias": True, "rms_norm_eps": 1e-3},
    ),
    "nemotron_h": (
        "nemotron_h",
        {"mamba_num_heads": 6, "mamba_head_dim": 4, "ssm_state_size": 5, "n_groups": 2, "conv_kernel": 4,
         "chunk_size": 16, "hidden_size": HIDDEN, "time_step_min": 0.4},
    ),
}  # fmt: skip
"""Model type and fields of config.json. Nemotron-H's inner size is not a multiple of its hidden size here, and its
steps are clamped; in `mamba2_options` they are on both sides."""


def weight(case: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 tensor of this Hugging Face name."""
    rng = np.random.default_rng([zlib.crc32(case.encode()), zlib.crc32(name.encode())])
    values = rng.standard_normal(shape)
    if name == "A_log":
        values = np.log(np.arange(1, shape[-1] + 1)) + 0.3 * values
    elif "norm" in name or name == "D":
        values = 1 + 0.3 * values
    elif name.endswith("bias"):
        values = 0.5 * values
    elif name == "conv1d.weight":
        values = 0.6 * values
    else:
        values = values * shape[-1] ** -0.5
    return values.astype(np.float32)


def inputs(case: str) -> tuple[np.ndarray, np.ndarray]:
    """float32[BATCH, LENGTH, HIDDEN] twice: what goes in, and the weights of the loss, `sum(weights * out)`."""
    rng = np.random.default_rng([zlib.crc32(case.encode()), 1])
    x, weights = rng.standard_normal((2, BATCH, LENGTH, HIDDEN)).astype(np.float32)
    return x, weights
