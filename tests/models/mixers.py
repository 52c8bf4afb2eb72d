"""State-space mixers of the golden files as ours: configs, and tensors under our paths."""

import importlib.util
import pathlib
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np

from llm_jax.base.trees import flatten, unflatten
from llm_jax.models.config import ModelConfig
from llm_jax.models.mamba import Mamba
from llm_jax.models.mamba2 import Mamba2
from llm_jax.models.mamba_config import MambaConfig
from llm_jax.models.parameter import abstract_params

TESTS = pathlib.Path(__file__).parents[1]


def _load_recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mixers_recipe", TESTS / "oracles" / "mixers_recipe.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RECIPE = _load_recipe()
MAMBA = ("mamba", "falcon_mamba", "jamba")


def golden(case: str) -> dict[str, np.ndarray]:
    return dict(np.load(TESTS / "golden" / "mixers" / f"{case}.npz"))


def config(case: str) -> ModelConfig:
    kind, hf = RECIPE.CASES[case]

    def field(*names: str, default: Any = None) -> Any:
        return next((hf[name] for name in names if name in hf), default)

    heads = field("num_heads", "mamba_n_heads", "mamba_num_heads", default=0)
    inner = field("expand", "mamba_expand", default=2) * hf["hidden_size"]
    if kind == "nemotron_h":
        inner = heads * hf["mamba_head_dim"]
    low, high = field("time_step_limit", default=(0.0, None))
    norms: Any = {"falcon_mamba": "plain", "jamba": "weighted"}.get(kind, "none")
    mamba = MambaConfig(
        inner_size=inner,
        state_size=field("state_size", "mamba_d_state", "ssm_state_size"),
        conv_width=field("conv_kernel", "mamba_d_conv", default=4),
        conv_bias=field("use_conv_bias", "mamba_conv_bias", default=True),
        activation=field("hidden_act", default="silu"),
        bias=field("use_bias", "mamba_proj_bias", default=False),
        dt_rank=field("time_step_rank", "mamba_dt_rank", default=0),
        num_heads=heads,
        num_groups=field("n_groups", "mamba_n_groups", default=1),
        selection_norm=norms,
        norm_eps=field("layer_norm_epsilon", "rms_norm_eps", "mixer_rms_eps", default=1e-6 if kind in MAMBA else 1e-5),
        dt_min=hf["time_step_min"] if kind == "nemotron_h" else low,
        dt_max=high,
    )
    return ModelConfig(hidden_size=hf["hidden_size"], mamba=mamba)


def mixer(case: str) -> Mamba | Mamba2:
    return (Mamba if RECIPE.CASES[case][0] in MAMBA else Mamba2)(config(case))


def as_ours(case: str, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors under Hugging Face names (or their gradients) as ours, by path."""
    mamba = config(case).mamba
    parts = (["x", "gate"], [mamba.inner_size] * 2)
    convs = (["conv"], [mamba.inner_size])
    if mamba.num_heads:
        shared = 2 * mamba.num_groups * mamba.state_size
        parts = (["gate", "x", "bc", "dt"], [mamba.inner_size, mamba.inner_size, shared, mamba.num_heads])
        convs = (["x_conv", "bc_conv"], [mamba.inner_size, shared])
    names = {"A_log": "rates/A_log", "D": "rates/skip", "dt_bias": "rates/dt_bias", "dt_proj.bias": "rates/dt_bias"}
    modules = {"x_proj": "selection", "dt_proj": "dt", "out_proj": "o", "norm": "norm"}
    modules |= {f"{name}_layernorm": f"{name}_norm" for name in ("dt", "b", "c")}
    ours = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if module in ("in_proj", "conv1d"):
            (paths, sizes), tensor = (parts if module == "in_proj" else convs), np.squeeze(tensor.T)
            pieces = np.split(tensor, np.cumsum(sizes)[:-1], axis=-1)
            ours |= {f"{path}/{leaf}": piece for path, piece in zip(paths, pieces)}
        else:
            turned = tensor.T if tensor.ndim == 2 and leaf == "weight" else tensor
            ours[names.get(name) or f"{modules[module]}/{leaf}"] = turned
    return ours


def params(case: str) -> dict[str, Any]:
    """Our parameters of a case; the golden file knows the tensors' shapes."""
    shapes = {name.removeprefix("grad/"): x.shape for name, x in golden(case).items() if name.startswith("grad/")}
    ours = as_ours(case, {name: RECIPE.weight(case, name, shape) for name, shape in shapes.items()})
    assert ours.keys() == flatten(abstract_params(mixer(case))).keys()
    return unflatten({path: jnp.asarray(value) for path, value in ours.items()})
