"""PEFT's folders: `adapter_config.json` and `adapter_model.safetensors`, in and out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

from llm_jax.adapters.config import LoraConfig
from llm_jax.adapters.places import in_stack, row_of
from llm_jax.adapters.sites import Adaptation, Site
from llm_jax.base.config import typed
from llm_jax.base.errors import UserError
from llm_jax.base.fields import field_types, plain
from llm_jax.base.trees import flatten, unflatten
from llm_jax.models.decoder import Decoder
from llm_jax.models.families import family
from llm_jax.models.families.tensors import Tensor
from llm_jax.storage.atomic import write_atomically
from llm_jax.storage.json_files import read_json
from llm_jax.storage.safetensors import read_file, write_file

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
BASE = "base_model_name_or_path"
SCORES = "llm_jax_scores"
"""Field of ours: what a config.json would say of a model's scores beside their number; PEFT reads on without it."""

# Fields of adapter_config.json that change nothing here, and those that do, with the values that mean nothing.
NOTES = {
    "auto_mapping", BASE, SCORES, "revision", "task_type", "peft_version", "inference_mode", "fan_in_fan_out",
    "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config",
    "qalora_group_size",
}  # fmt: skip
NOTHING = (None, False, {}, [])
DEFINED = ("gate_up_proj", "up_proj", "down_proj")
"""Parameters of transformers' experts in the order that modules define them."""


@dataclass(frozen=True)
class Adapter:
    """An adapter's numbers, and what its folder said beside them."""

    config: LoraConfig
    params: dict[str, Any]
    """The tree of `Adaptation.abstract`."""
    said: dict[str, Any] = field(default_factory=dict)
    """adapter_config.json as it was read; empty for an adapter made here."""
    dtypes: dict[str, str] = field(default_factory=dict)
    """Of the tensors read, by name."""
    repeated: tuple[str, ...] = ()
    """Weights of the model that the folder has again, as PEFT does where an embedding has an adapter."""
    scores: dict[str, Any] = field(default_factory=dict)
    """Fields of the config.json of a model that ends in scores: the names of classes, and whether it compares."""


def is_peft_folder(path: epath.PathLike) -> bool:
    return (epath.Path(path) / CONFIG).exists()


def read_config(path: epath.PathLike) -> tuple[LoraConfig, dict[str, Any]]:
    """What a folder's adapter_config.json says, and the whole of it.

    Raises UserError for another kind of adapter than LoRA, and for fields that change what it computes and are not
    honoured, by name.
    """
    file = epath.Path(path) / CONFIG
    said = read_json(file)
    if said.get("peft_type") != "LORA":
        raise UserError(f"{file}: peft_type={said.get('peft_type')!r} is not supported (only LORA)")
    types, values = field_types(LoraConfig), {}
    for name, value in said.items():
        if name in types and name != "loraplus_lr_ratio":
            if value is not None:
                values[name] = typed(types[name], value, f"{file}: {name}")
        elif name not in NOTES and name != "peft_type" and value not in NOTHING:
            raise UserError(f"{file}: {name}={value!r} is not supported")
    values.setdefault("target_modules", None)
    return LoraConfig(**values), said


def read_scores(said: Mapping[str, Any]) -> dict[str, Any]:
    """`Adapter.scores` from what an adapter_config.json says."""
    return dict(said.get(SCORES) or {})


def read_adapter(path: epath.PathLike, decoder: Decoder, base: Mapping[str, Any]) -> tuple[Adaptation, Adapter]:
    """The adapter in a folder, for a model. Parameters are float32 NumPy arrays.

    Raises UserError as `read_config` and `Adaptation` do, and where tensors are not those of an adapter of this model:
    one that is missing, unknown or of another shape, both shapes said.
    """
    path = epath.Path(path)
    config, said = read_config(path)
    adaptation, stored = check_tensors(path, decoder)
    names, repeated = to_tensors(adaptation), []
    for name in stored:
        if name not in names:
            _check_repeated(path, name, stored[name], decoder, base)
            repeated.append(name)
    dtypes = {name: str(array.dtype) for name, array in stored.items()}
    params, scores = from_tensors(adaptation, stored), read_scores(said)
    return adaptation, Adapter(config, params, said, dtypes, tuple(repeated), scores)


def check_tensors(path: epath.PathLike, decoder: Decoder) -> tuple[Adaptation, dict[str, np.ndarray]]:
    """The adapter in a folder for a model, and the tensors of its file. Raises UserError as `read_adapter`, except for
    tensors that are none of the adapter's."""
    path = epath.Path(path)
    adaptation = _for_model(path, decoder, read_config(path)[0])
    stored = read_file(path / WEIGHTS)
    for name, wanted in to_tensors(adaptation).items():
        if name not in stored:
            raise UserError(f"{path / WEIGHTS} has no {name}: it is an adapter of another model than this")
        if stored[name].shape != wanted:
            raise UserError(
                f"{path / WEIGHTS}: {name} has shape {list(stored[name].shape)}, an adapter of this model has "
                f"{list(wanted)}"
            )
    return adaptation, stored


def _for_model(path: epath.Path, decoder: Decoder, config: LoraConfig) -> Adaptation:
    try:
        return Adaptation(decoder, config)
    except UserError as error:
        raise UserError(f"{path} does not fit the {decoder.config.family} model: {error}") from None


def _check_repeated(path: epath.Path, name: str, array: np.ndarray, decoder: Decoder, base: Mapping[str, Any]) -> None:
    """A tensor that is none of the adapter's is to be the model's own."""
    own = _of_model(decoder, base, name)
    if own is None:
        raise UserError(f"{path / WEIGHTS} has {name}, which an adapter of this model does not have")
    if own.shape != array.shape:
        raise UserError(f"{path / WEIGHTS}: {name} has shape {list(array.shape)}, the model's is {list(own.shape)}")
    if not np.array_equal(own.astype(array.dtype), array):
        raise UserError(f"{path / WEIGHTS}: {name} differs from the model's: it is an adapter of another model")


def _of_model(decoder: Decoder, base: Mapping[str, Any], name: str) -> np.ndarray | None:
    """The model's weight that PEFT calls `...MODULE.base_layer.weight`, outside of the layers."""
    if not name.endswith(".base_layer.weight"):
        return None
    fam, wanted = family(decoder.config.family), name.removeprefix(PREFIX).replace(".base_layer.", ".")
    for tensor in fam.tensors(decoder):
        if tensor.layer is None and fam.running(tensor.names[0]) == wanted:
            return tensor.form.write([np.asarray(flatten(base)[path]) for path in tensor.paths])[0]
    head = f"{fam.TOP.get('head')}.weight"
    if decoder.config.tie_embeddings and wanted == fam.running(head):
        return np.asarray(flatten(base)["embed/weight"])
    return None


def to_tensors(adaptation: Adaptation, params: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """An adapter's numbers under the names of its file, float32; without `params` their shapes."""
    if params is None:
        return {name: what.shape() for name, what in _tensors(adaptation)}
    flat = {name: np.asarray(leaf) for name, leaf in flatten(params).items()}
    return {name: what.give(flat) for name, what in _tensors(adaptation)}


def from_tensors(adaptation: Adaptation, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The other way; float32 NumPy arrays."""
    flat = {path: np.zeros(leaf.shape, np.float32) for path, leaf in flatten(adaptation.abstract).items()}
    for name, what in _tensors(adaptation):
        what.take(tensors[name], flat)
    return unflatten(flat)


def write_adapter(
    path: epath.PathLike,
    adaptation: Adaptation,
    adapter: Adapter,
    base: Mapping[str, Any],
    named: str | None = None,
    dtype: str | None = None,
) -> None:
    """Writes the folder that PEFT reads.

    `base`: the model's parameters. `named`: where the model lies; None leaves what the adapter's folder said. `dtype`
    of all tensors; None keeps what each had, float32 for new ones.
    """
    path = epath.Path(path)
    path.mkdir(parents=True, exist_ok=True)
    found = {
        name: array.astype(jnp.dtype(dtype or adapter.dtypes.get(name, "float32")))
        for name, array in to_tensors(adaptation, adapter.params).items()
    }
    for name in adapter.repeated:
        own = _of_model(adaptation.decoder, base, name)
        assert own is not None
        found[name] = own.astype(jnp.dtype(dtype or adapter.dtypes[name]))
    write_file(path / WEIGHTS, found, {"format": "pt"})
    said = adapter.said or _config(adaptation, adapter.scores)
    said = said if named is None else {**said, BASE: named}
    write_atomically(path / CONFIG, json.dumps(said, indent=2, sort_keys=True))


def _config(adaptation: Adaptation, scores: Mapping[str, Any]) -> dict[str, Any]:
    """adapter_config.json of an adapter made here, targets by name."""
    config = adaptation.config
    fields = {name: plain(value) for name, value in dataclasses.asdict(config).items() if name != "loraplus_lr_ratio"}
    if isinstance(config.target_modules, str) and config.target_modules == "all-linear":
        # PEFT would take the head of a model that ends in scores for one of all.
        fields["target_modules"] = [r.place.module for s in adaptation.sites for _, r in s.chosen if not r.by_parameter]
    alphas = {"lora_alpha": config.lora_alpha, **config.alpha_pattern}
    whole = {name: int(alpha) if float(alpha).is_integer() else alpha for name, alpha in alphas.items()}
    fields |= {"lora_alpha": whole.pop("lora_alpha"), "alpha_pattern": whole}
    head = adaptation.decoder.config.head
    task = "TOKEN_CLS" if head.pooling == "none" else "SEQ_CLS"
    return (
        fields
        | ({SCORES: dict(scores)} if scores else {})
        | {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM" if head.labels is None else task,
            BASE: None,
            "inference_mode": True,
            "fan_in_fan_out": not family(adaptation.decoder.config.family).TRANSPOSED,
        }
    )


class _Factor:
    """`a`, `b` or `magnitude` of a row of a site, as a tensor of theirs."""

    def __init__(self, site: Site, row: int, name: str):
        chosen = site.rows[row]
        assert chosen is not None
        self.site, self.name, self.place, self.rank = site, name, site.place, chosen.rank
        at = () if site.layers is None else (row,)
        r, every = slice(self.rank), slice(None)
        self.at = {"a": (*at, ..., r), "b": (*at, ..., r, every), "magnitude": (*at, ...)}[name]
        self.path = f"{site.path}/{name}"

    def shape(self) -> tuple[int, ...]:
        place, n = self.place, self.rank * (self.place.experts or 1)
        if self.name == "magnitude":
            return (place.outputs,)
        inputs = self.name == "a"
        side = place.inputs if inputs else place.outputs
        return (n, side) if inputs != place.turned else (side, n)

    def give(self, flat: Mapping[str, np.ndarray]) -> np.ndarray:
        """PEFT holds factors of experts as matrices: A by expert, then rank; B by rank, then expert."""
        own = flat[self.path][self.at]
        if self.name == "magnitude":
            return own
        # [experts, side, rank]
        own = own if self.name == "a" else np.swapaxes(own, -1, -2)
        if (self.name == "a") != self.place.turned:
            return np.swapaxes(own, -1, -2).reshape(self.shape())
        return np.moveaxis(own, 0, -1).reshape(self.shape()) if own.ndim == 3 else own

    def take(self, array: np.ndarray, flat: dict[str, np.ndarray]) -> None:
        if self.name == "magnitude":
            flat[self.path][self.at] = array
            return
        lead = () if self.place.experts is None else (self.place.experts,)
        if (self.name == "a") != self.place.turned:
            own = np.swapaxes(array.reshape(*lead, self.rank, -1), -1, -2)
        else:
            own = np.moveaxis(array.reshape(-1, self.rank, *lead), -1, 0) if lead else array
        flat[self.path][self.at] = own if self.name == "a" else np.swapaxes(own, -1, -2)


class _Whole:
    """A tensor of theirs of which the adapter has a copy."""

    def __init__(self, adaptation: Adaptation, tensor: Tensor):
        self.tensor, decoder = tensor, adaptation.decoder
        self.paths = [in_stack(decoder, path, tensor.layer) for path in tensor.paths]
        self.at = (row_of(decoder, tensor.layer)[2],) if tensor.layer is not None else ()
        shapes = flatten(adaptation.abstract)
        self.shapes = [shapes[path].shape[len(self.at) :] for path in self.paths]

    def shape(self) -> tuple[int, ...]:
        return self.tensor.form.shapes(self.shapes)[0]

    def give(self, flat: Mapping[str, np.ndarray]) -> np.ndarray:
        return self.tensor.form.write([flat[path][(*self.at, ...)] for path in self.paths])[0]

    def take(self, array: np.ndarray, flat: dict[str, np.ndarray]) -> None:
        for path, own in zip(self.paths, self.tensor.form.read([array], self.shapes)):
            flat[path][(*self.at, ...)] = own


def _tensors(adaptation: Adaptation) -> list[tuple[str, _Factor | _Whole]]:
    """The tensors of a folder by name, and what they hold."""
    found: list[tuple[str, _Factor | _Whole]] = []
    adapted, wrapped = set(), {}
    for site in adaptation.sites:
        for _, chosen in site.chosen:
            adapted.add(chosen.place.module)
            wrapped.setdefault(chosen.place.module, []).append(chosen.place.parameter)
    for site in adaptation.sites:
        for row, chosen in site.chosen:
            place = chosen.place
            # PEFT puts a module around the module for each parameter: the last that it defines is outermost.
            own = sorted(wrapped[place.module], key=lambda name: DEFINED.index(name) if name in DEFINED else -1)
            inside = ".base_layer" * (len(own) - 1 - own.index(place.parameter))
            start, embeds = f"{PREFIX}{place.module}{inside}.lora_", place.kind == "embedding"
            a, b = ("embedding_A", "embedding_B") if embeds else ("A.weight", "B.weight")
            a, b = (b, a) if place.turned else (a, b)
            found += [(start + a, _Factor(site, row, "a")), (start + b, _Factor(site, row, "b"))]
            if adaptation.config.use_dora:
                found.append((f"{start}magnitude_vector", _Factor(site, row, "magnitude")))
    for name, tensor in adaptation.saved_tensors:
        module, _, leaf = name.rpartition(".")
        found.append(
            (f"{PREFIX}{module}{'.base_layer' if module in adapted else ''}.{leaf}", _Whole(adaptation, tensor))
        )
    return found
