"""The rotary part of a config.json, in the spelling of transformers 5 (`rope_parameters`) and of older releases
(`rope_theta` beside `rope_scaling` with a `type` or `rope_type`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_jax.base.config import typed
from llm_jax.base.errors import UserError
from llm_jax.base.fields import field_types
from llm_jax.models.config import ModelConfig
from llm_jax.models.rope_config import RopeScaling

COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
# Kind -> ours -> theirs, what a scaling may say.
_EXTENDED = {"factor": "factor", "original_length": "original_max_position_embeddings"}
KINDS: dict[str, dict[str, str]] = {
    "linear": {"factor": "factor"},
    "dynamic": {"factor": "factor"},
    "yarn": _EXTENDED
    | {name: name for name in ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")},
    "llama3": _EXTENDED | {name: name for name in ("low_freq_factor", "high_freq_factor")},
    "longrope": _EXTENDED | {name: name for name in ("attention_factor", "short_factor", "long_factor")},
}
BY_KIND = ("full_attention", "sliding_attention")


def read_rope(hf: Mapping[str, Any], values: Mapping[str, Any], theta: float, partial: float = 1.0) -> dict[str, Any]:
    """`rope_theta`, `rope_dim` and `rope_scaling` of ours.

    `values`: the other fields; `theta` and `partial` (the share of a head that turns): where none is said.
    """
    new, old = (
        typed(dict[str, Any] | None, hf.get(name), f"config.json: {name}") or {}
        for name in ("rope_parameters", "rope_scaling")
    )
    where = f"rope_scaling={old!r}" if old else f"rope_parameters={new!r}"
    return rope_fields(old or new, hf, values, theta, f"config.json: {where}", partial)


def rope_fields(
    rope: Mapping[str, Any],
    hf: Mapping[str, Any],
    values: Mapping[str, Any],
    theta: float,
    where: str,
    partial: float = 1.0,
) -> dict[str, Any]:
    """The same from one flat dict of parameters, beside the fields at the top. `where` names it in errors."""

    def said(name: str, kind: Any, default: Any) -> Any:
        found = [
            typed(kind, place[name], f"config.json: {name}") for place in (rope, hf) if place.get(name) is not None
        ]
        if len(set(found)) > 1:
            raise UserError(f"config.json: {name} is {found[0]} in the rope parameters, and {found[1]} at the top")
        return found[0] if found else default

    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or (kind != "default" and kind not in KINDS):
        raise UserError(f"{where}: the type {kind!r} is not one of default, {', '.join(KINDS)}")
    head_dim = values.get("head_dim") or values["hidden_size"] // max(values["num_heads"], 1)
    partial = said("partial_rotary_factor", float, partial)
    fields = {
        "rope_theta": said("rope_theta", float, theta),
        "rope_dim": None if partial == 1.0 else int(head_dim * partial),
    }
    names = KINDS.get(kind, {})
    for name, value in rope.items():
        # What a kind doesn't read has no effect there; None is as good as absent.
        if name not in COMMON and name not in names.values() and value is not None:
            raise UserError(f"{where}: {name} says nothing in the type {kind}")
    return fields if kind == "default" else fields | {"rope_scaling": _scaling(kind, names, rope, hf, values)}


def _scaling(
    kind: str, names: Mapping[str, str], rope: Mapping[str, Any], hf: Mapping[str, Any], values: Mapping[str, Any]
) -> RopeScaling:
    kinds = field_types(RopeScaling)
    longest = values["max_position_embeddings"]
    found: dict[str, Any] = {}
    for ours, theirs in names.items():
        value = rope.get(theirs)
        if ours == "original_length":
            # Phi-3 says it at the top, which then counts.
            value = hf.get(theirs) or value or longest
        if value is not None:
            found[ours] = typed(kinds[ours], value, f"config.json: {theirs}")
    if "factor" not in found:
        if kind not in ("yarn", "longrope"):
            raise UserError(f"config.json: the rope type {kind} needs a factor")
        found["factor"] = longest / found["original_length"]
    return RopeScaling(kind=kind, **found)  # pyright: ignore[reportArgumentType]


def write_rope(config: ModelConfig, partial: float = 1.0) -> dict[str, Any]:
    """Fields that both spellings read as the config's. `partial`: the share of a head that turns where none is said."""
    parameters = rope_parameters(config, partial)
    fields = {"rope_theta": config.rope_theta, "rope_parameters": parameters}
    if "partial_rotary_factor" in parameters:
        fields["partial_rotary_factor"] = parameters["partial_rotary_factor"]
    if config.rope_scaling is not None:
        fields["rope_scaling"] = {k: v for k, v in parameters.items() if k not in COMMON or k == "rope_type"}
    return fields


def rope_parameters(config: ModelConfig, partial: float = 1.0) -> dict[str, Any]:
    """The flat dict of release 5."""
    config = config.resolved()
    assert config.rope_dim is not None and config.head_dim is not None
    scaling = config.rope_scaling
    parameters: dict[str, Any] = {
        "rope_type": "default" if scaling is None else scaling.kind,
        "rope_theta": config.rope_theta,
    }
    if config.rope_dim != config.head_dim or partial != 1.0:
        parameters["partial_rotary_factor"] = config.rope_dim / config.head_dim
    for ours, theirs in KINDS[scaling.kind].items() if scaling is not None else ():
        value = getattr(scaling, ours)
        if value is not None:
            parameters[theirs] = list(value) if isinstance(value, tuple) else value
    return parameters


def of_full_layers(
    hf: Mapping[str, Any], values: Mapping[str, Any], local_name: str, local_theta: float
) -> tuple[dict[str, Any], float]:
    """A config.json with rope parameters by kind of layer, as one with those of its full layers alone; and the base of
    its sliding layers, which is `local_name` in older releases and `local_theta` where nothing says it.

    Raises UserError where parameters are not by kind of layer, sliding layers have a scaling, or heads turn in part.
    """
    rope = typed(dict[str, Any] | None, hf.get("rope_parameters"), "config.json: rope_parameters") or {}
    old = typed(dict[str, Any] | None, hf.get("rope_scaling"), "config.json: rope_scaling") or {}
    where = f"config.json: rope_parameters={rope!r}"
    for name, value in rope.items():
        if name not in BY_KIND and value is not None:
            raise UserError(f"{where}: {name} is not one of the kinds of layers, {', '.join(BY_KIND)}")
    full, local = (typed(dict[str, Any] | None, rope.get(kind), where) or {} for kind in BY_KIND)
    for place in (hf, full, local, old):
        part = place.get("partial_rotary_factor")
        # Some of transformers' rope types read it in such models, and the plain one does not.
        if part not in (None, 1):
            raise UserError(f"config.json: partial_rotary_factor={part!r} is not supported where layers differ in rope")
    fields = rope_fields(local, {"rope_theta": hf.get(local_name)}, values, local_theta, where)
    if "rope_scaling" in fields:
        raise UserError(f"{where}: sliding layers with a scaling are not supported")
    return {**hf, "rope_parameters": {**full, **old}, "rope_scaling": None}, fields["rope_theta"]


def parameters_by_kind(config: ModelConfig) -> dict[str, Any]:
    """`rope_parameters` of a model whose sliding layers have a base of their own."""
    local = {"rope_type": "default", "rope_theta": config.local_rope_theta}
    return {"full_attention": rope_parameters(config), "sliding_attention": local}
