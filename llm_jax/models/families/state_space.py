"""Mamba layers in config.json, and how its tensors hold the convolution."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from llm_jax.base.config import typed
from llm_jax.base.errors import UserError
from llm_jax.base.fields import field_types
from llm_jax.models.config import ModelConfig
from llm_jax.models.families.base import SPELLING, Family
from llm_jax.models.families.tensors import Form, Shape
from llm_jax.models.mamba_config import MambaConfig

STEPS = {
    "dt_init_min": ("time_step_min", 1e-3),
    "dt_init_max": ("time_step_max", 0.1),
    "dt_init_floor": ("time_step_floor", 1e-4),
}


@dataclasses.dataclass(frozen=True)
class ConvForm(Form):
    """torch's depthwise Conv1d: weight [channels, 1, taps], for ours [taps, channels]; the bias as it is."""

    def shapes(self, ours: Sequence[Shape]) -> list[Shape]:
        """Shapes of theirs."""
        return [(shape[0], 1, shape[1]) if len(shape) == 2 else shape for shape in super().shapes(ours)]

    def read(self, theirs: Sequence[np.ndarray], ours: Sequence[Shape]) -> list[np.ndarray]:
        """Arrays of the shapes `ours`."""
        return super().read([array[:, 0] if array.ndim == 3 else array for array in theirs], ours)

    def write(self, ours: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The other way."""
        return [array[:, None] if array.ndim == 2 else array for array in super().write(ours)]


class StateSpace(Family):
    """A model of state-space layers alone: a norm and a mixer in each, no feed-forward, no positions."""

    MIXER: ClassVar[str]
    MAMBA: ClassVar[dict[str, tuple[str, Any]]]
    """Fields of `MambaConfig` -> (theirs, what transformers takes where the field is absent)."""
    FIELDS = {
        "vocab_size": ("vocab_size", 50280),
        "hidden_size": ("hidden_size", 768),
        "num_layers": ("num_hidden_layers", 32),
        "norm_eps": ("layer_norm_epsilon", 1e-5),
        "tie_embeddings": ("tie_word_embeddings", True),
        "init_std": ("initializer_range", 0.1),
    }
    CONSTANTS = {
        "positions": "none",
        # Of layers that these models have not.
        "num_heads": 1,
        "intermediate_size": 1,
        # A state takes texts of any length.
        "max_position_embeddings": 2**20,
    }
    FIXED = {"rms_norm": (True, None), "ssm_cfg": ({}, None)}
    CARRIED = {
        "residual_in_fp32",
        "rescale_prenorm_residual",
        "fused_add_norm",
        "pad_vocab_size_multiple",
        "time_step_init_scheme",
        "time_step_scale",
        "use_mambapy",
        "use_falcon_mambapy",
        "use_associative_scan",
        "chunk_size",
    }
    TOP = {"embed": "backbone.embeddings", "norm": "backbone.norm_f", "head": "lm_head"}
    PREFIX = "backbone.layers."

    def derived_fields(self) -> set[str]:
        return {theirs for theirs, _ in self.MAMBA.values()} | {"hidden_act", "expand", "intermediate_size"}

    def derived(self, hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        kinds = field_types(MambaConfig)
        mamba = {
            name: typed(kinds[name], hf.get(theirs, default), f"config.json: {theirs}")
            for name, (theirs, default) in self.MAMBA.items()
        }
        act = hf.get("hidden_act", "silu")
        if not isinstance(act, str) or act not in self.ACTIVATIONS:
            raise UserError(f"config.json: hidden_act={act!r} is not one of {', '.join(self.ACTIVATIONS)}")
        mamba["activation"] = self.ACTIVATIONS[act]
        inner = typed(int, hf.get("expand", 2), "config.json: expand") * values["hidden_size"]
        if hf.get("intermediate_size", inner) != inner:
            raise UserError(f"config.json: intermediate_size={hf['intermediate_size']!r} is not expand * hidden_size")
        mamba["inner_size"] = inner
        mamba |= self.mamba_from_hf(hf, values)
        layers = values["num_layers"]
        mixers, feeds = (self.MIXER,) * layers, ("none",) * layers
        return {"mixers": mixers, "feed_forwards": feeds, "mamba": MambaConfig(**mamba)}

    def mamba_from_hf(self, hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of `MambaConfig` that no single field of theirs says."""
        del hf, values
        return {}

    def written(self, config: ModelConfig) -> dict[str, Any]:
        mamba = config.mamba
        fields = {theirs: getattr(mamba, name) for name, (theirs, _) in self.MAMBA.items()}
        return fields | {"hidden_act": SPELLING[mamba.activation], "expand": mamba.inner_size // config.hidden_size}

    def fused_form(self, theirs: str, config: ModelConfig) -> Form:
        del config
        return ConvForm(transposed=True) if theirs.endswith("conv1d") else Form(transposed=True)

    def canonical(self, name: str) -> str:
        return name.replace("backbone.embedding.", "backbone.embeddings.")


def read_limits(value: Any) -> dict[str, Any]:
    """`time_step_limit`: a pair whose second may be infinite, as Python's JSON or transformers 5 spell it."""
    where = "config.json: time_step_limit"
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise UserError(f"{where}={value!r} is not a pair of numbers")
    low, high = value
    bounded = high not in (math.inf, {"__float__": "Infinity"})
    return {"dt_min": typed(float, low, where), "dt_max": typed(float, high, where) if bounded else None}


def write_limits(mamba: MambaConfig) -> list[Any]:
    """The other way."""
    return [mamba.dt_min, {"__float__": "Infinity"} if mamba.dt_max is None else mamba.dt_max]
