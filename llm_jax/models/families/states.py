"""State-space layers in config.json, of models that have no others and of hybrids, and how tensors hold them."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from llm_jax.base.config import typed
from llm_jax.base.errors import UserError
from llm_jax.base.fields import field_types
from llm_jax.models.config import Mixer, ModelConfig
from llm_jax.models.families.base import SPELLING, Family
from llm_jax.models.families.tensors import Form, Holding, Shape
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


class WithStates(Family, abc.ABC):
    """Goes before the family that the rest of the model is like, after `WithMamba` or `WithMamba2`, which say more."""

    MIXER: ClassVar[Mixer]
    """Of the layers with states."""
    MAMBA: ClassVar[dict[str, tuple[str, Any]]]
    """Fields of `MambaConfig` -> (theirs, what transformers takes where the field is absent)."""
    MAMBA_ACTIVATION: ClassVar[str] = "hidden_act"
    EXPAND: ClassVar[str | None] = "mamba_expand"
    """Their field for the scan's channels over the model's width; None where heads say how many they are."""

    @abc.abstractmethod
    def mixers(self, hf: Mapping[str, Any], values: Mapping[str, Any]) -> tuple[Mixer, ...]:
        """That of each layer."""

    def inner_size(self, hf: Mapping[str, Any], values: Mapping[str, Any]) -> int:
        """Channels of the scan."""
        assert self.EXPAND is not None
        return typed(int, hf.get(self.EXPAND, 2), f"config.json: {self.EXPAND}") * values["hidden_size"]

    def mamba_from_hf(self, hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of `MambaConfig` that no single field of theirs says."""
        return {"inner_size": self.inner_size(hf, values)}

    def derived_fields(self) -> set[str]:
        own = {theirs for theirs, _ in self.MAMBA.values()} | {self.MAMBA_ACTIVATION}
        return super().derived_fields() | own | ({self.EXPAND} if self.EXPAND else set())

    def derived(self, hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        mixers = self.mixers(hf, values)
        found = super().derived(hf, values) | {"mixers": mixers}
        return found | {"mamba": self._mamba(hf, values)} if self.MIXER in mixers else found

    def _mamba(self, hf: Mapping[str, Any], values: Mapping[str, Any]) -> MambaConfig:
        kinds = field_types(MambaConfig)
        fields = {
            name: typed(kinds[name], hf.get(theirs, default), f"config.json: {theirs}")
            for name, (theirs, default) in self.MAMBA.items()
        }
        act = hf.get(self.MAMBA_ACTIVATION, "silu")
        fields["activation"] = self.value_from_hf("activation", self.MAMBA_ACTIVATION, act)
        return MambaConfig(**(fields | self.mamba_from_hf(hf, values)))

    def written(self, config: ModelConfig) -> dict[str, Any]:
        assert config.mixers is not None
        fields = super().written(config)
        if self.MIXER not in config.mixers:
            return fields
        fields |= {theirs: getattr(config.mamba, name) for name, (theirs, _) in self.MAMBA.items()}
        fields[self.MAMBA_ACTIVATION] = SPELLING[config.mamba.activation]
        return fields | ({self.EXPAND: config.mamba.inner_size // config.hidden_size} if self.EXPAND else {})

    def fused_form(self, theirs: str, config: ModelConfig) -> Holding:
        return ConvForm(transposed=True) if theirs.endswith("conv1d") else super().fused_form(theirs, config)


class WithMamba(WithStates):
    """Of Mamba's layers."""

    MIXER = "mamba"
    RANK: ClassVar[str] = "mamba_dt_rank"
    """Their field for the width of what step sizes are made of."""

    def derived_fields(self) -> set[str]:
        return super().derived_fields() | {self.RANK}

    def mamba_from_hf(self, hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        rank = hf.get(self.RANK, "auto")
        if rank == "auto":
            rank = math.ceil(values["hidden_size"] / 16)
        return super().mamba_from_hf(hf, values) | {"dt_rank": typed(int, rank, f"config.json: {self.RANK}")}

    def written(self, config: ModelConfig) -> dict[str, Any]:
        own = {self.RANK: config.mamba.dt_rank} if config.mamba.dt_rank else {}
        return super().written(config) | own


class WithMamba2(WithStates):
    """Of Mamba-2's layers."""

    MIXER = "mamba2"
    MAMBA = {
        "state_size": ("mamba_d_state", 256),
        "conv_width": ("mamba_d_conv", 4),
        "conv_bias": ("mamba_conv_bias", True),
        "bias": ("mamba_proj_bias", False),
        "num_heads": ("mamba_n_heads", 128),
        "num_groups": ("mamba_n_groups", 1),
    }
    HEAD_DIM: ClassVar[tuple[str, Any]] = ("mamba_d_head", "auto")
    """Their field for the channels of a head, and what transformers takes where it is absent."""

    def derived_fields(self) -> set[str]:
        return super().derived_fields() | {self.HEAD_DIM[0], "time_step_limit"}

    def inner_size(self, hf: Mapping[str, Any], values: Mapping[str, Any]) -> int:
        inner, said = super().inner_size(hf, values), hf.get(*self.HEAD_DIM)
        if said == "auto":
            return inner
        (heads, count), (width, _) = (self.MAMBA["num_heads"], self.HEAD_DIM)
        count = typed(int, hf.get(heads, count), f"config.json: {heads}")
        if typed(int, said, f"config.json: {width}") * count != inner:
            raise UserError(
                f"config.json: {width}={said!r} times {heads}={count} is not {self.EXPAND} * hidden_size, {inner}"
            )
        return inner

    def mamba_from_hf(self, hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        limits = read_limits(hf.get("time_step_limit", (0.0, math.inf)))
        return super().mamba_from_hf(hf, values) | limits | {"norm_eps": values["norm_eps"]}

    def written(self, config: ModelConfig) -> dict[str, Any]:
        fields, mamba = super().written(config), config.mamba
        if not mamba.num_heads:
            # transformers wants a number that divides the width even where no layer has heads.
            return fields | {self.MAMBA["num_heads"][0]: 1}
        return fields | {self.HEAD_DIM[0]: mamba.head_dim, "time_step_limit": write_limits(mamba)}


def mamba_names(theirs: str) -> dict[str, str]:
    """A family's `LAYER`, of the module that it calls `theirs`."""
    return {
        "mamba/selection": f"{theirs}.x_proj",
        "mamba/dt": f"{theirs}.dt_proj",
        "mamba/rates/dt_bias": f"{theirs}.dt_proj.bias",
        "mamba/rates/A_log": f"{theirs}.A_log",
        "mamba/rates/skip": f"{theirs}.D",
        "mamba/o": f"{theirs}.out_proj",
    }


def mamba_fused(theirs: str) -> dict[str, tuple[str, ...]]:
    """Its `FUSED`."""
    return {f"{theirs}.in_proj": ("mamba/x", "mamba/gate"), f"{theirs}.conv1d": ("mamba/conv",)}


def mamba2_names(theirs: str) -> dict[str, str]:
    """The same of Mamba-2's layers."""
    return {
        "mamba2/rates/dt_bias": f"{theirs}.dt_bias",
        "mamba2/rates/A_log": f"{theirs}.A_log",
        "mamba2/rates/skip": f"{theirs}.D",
        "mamba2/norm": f"{theirs}.norm",
        "mamba2/o": f"{theirs}.out_proj",
    }


def mamba2_fused(theirs: str) -> dict[str, tuple[str, ...]]:
    """Its `FUSED`."""
    return {
        f"{theirs}.in_proj": ("mamba2/gate", "mamba2/x", "mamba2/bc", "mamba2/dt"),
        f"{theirs}.conv1d": ("mamba2/x_conv", "mamba2/bc_conv"),
    }


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
