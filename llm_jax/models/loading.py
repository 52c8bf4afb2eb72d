"""Models from and to files: Hugging Face folders, native folders and workdirs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Float, Int

from llm_jax.base.config import bind as bind_config
from llm_jax.base.errors import UserError
from llm_jax.base.logging import log
from llm_jax.base.trees import flatten, unflatten
from llm_jax.models.config import ModelConfig
from llm_jax.models.decoder import Decoder, layout
from llm_jax.models.families import family, family_for
from llm_jax.models.families.base import Family
from llm_jax.models.families.packed import notes, open_tensors
from llm_jax.models.families.tensors import Tensor
from llm_jax.models.parameter import abstract_params, bind, declarations
from llm_jax.models.segments import regroup
from llm_jax.sharding import check_divides, make_plan, place, storage_shardings, use
from llm_jax.sharding.config import MeshConfig
from llm_jax.sharding.plan import Plan
from llm_jax.storage.json_files import read_json
from llm_jax.storage.remote import to_path
from llm_jax.storage.safetensors import TensorInfo, has_weights, read_index
from llm_jax.storage.workdir import Workdir, is_workdir

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
FLOATS = ("float32", "bfloat16", "float16")
EXTRA = "hf_extra.json"
"""In a native folder or workdir: fields of the config.json a model first came with that are none of ModelConfig's."""
ROLE = "policy"
"""The role whose parameters a workdir's checkpoint is loaded for."""


class Model:
    """A decoder with its parameters, callable on tokens. `params` is a plain nested dict of arrays."""

    def __init__(
        self,
        decoder: Decoder,
        params: Mapping[str, Any],
        config: ModelConfig,
        tokenizer_dir: epath.PathLike | None = None,
        *,
        plan: Plan | None = None,
        extra: Mapping[str, Any] | None = None,
        dtypes: Mapping[str, str] | None = None,
    ):
        """`decoder` is abstract. `extra`: fields of config.json that are none of `config`'s, for `save`.
        `dtypes`: the dtype each tensor had in the folder it came from, by Hugging Face name."""
        self.decoder, self.params, self.config = decoder, params, config
        self.tokenizer_dir = None if tokenizer_dir is None else epath.Path(tokenizer_dir)
        self.plan, self.extra, self.dtypes = plan, dict(extra or {}), dict(dtypes or {})
        self._forward = jax.jit(self._logits)
        self._score = jax.jit(self._scores, static_argnames="documents")

    def _logits(self, params: Any, tokens: Array, positions: Array | None, segment_ids: Array | None) -> Array:
        bound = bind(self.decoder, params)
        return bound.logits(bound(tokens, positions, segment_ids)[0])

    def __call__(
        self,
        tokens: Int[Any, "B T"],
        positions: Int[Any, "B T"] | None = None,
        segment_ids: Int[Any, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """float32 logits. `positions` default to 0, 1, ...; `segment_ids` (0 is padding) to one document per row.

        Raises UserError for a model that ends in scores.
        """
        with use(self.plan):
            return self._forward(self.params, *self._inputs(tokens, positions, segment_ids))

    def scores(
        self,
        tokens: Int[Any, "B T"],
        positions: Int[Any, "B T"] | None = None,
        segment_ids: Int[Any, "B T"] | None = None,
        documents: int = 1,
    ) -> Float[Array, "B documents labels"] | Float[Array, "B T labels"]:
        """float32 scores of a reward, value or classification model (`Decoder.scores`); arguments as for logits.

        Of the documents 1, …, `documents` of each row, or of each token, as the model's head says. Raises UserError
        for a model that ends in logits.
        """
        with use(self.plan):
            return self._score(self.params, *self._inputs(tokens, positions, segment_ids), documents=documents)

    def _inputs(self, *given: Any) -> list[Array | None]:
        if self.plan is not None:
            check_divides(self.plan, {"batch": len(given[0])})
        return [None if x is None else jnp.asarray(x, jnp.int32) for x in given]

    def _scores(
        self, params: Any, tokens: Array, positions: Array | None, segment_ids: Array | None, documents: int
    ) -> Array:
        bound = bind(self.decoder, params)
        return bound.scores(bound(tokens, positions, segment_ids)[0], segment_ids, documents)


def load(path: epath.PathLike, dtype: str = "float32", mesh: MeshConfig | None = None) -> Model:
    """The model in a Hugging Face folder, a native folder or a workdir (its newest good checkpoint).

    Args:
        path: which of the three it is, is recognised.
        dtype: of parameters and computation.
        mesh: spreads the parameters over devices, those of all processes, which all call this; None puts them on the
            default one of this process.

    Raises:
        UserError: nothing known lies there, a field of config.json is not honoured, a tensor is missing, unknown or of
            another shape, weights are in a pickle, or the mesh does not divide devices, heads, width or vocabulary.
    """
    if dtype not in FLOATS:
        raise UserError(f"dtype {dtype!r} is not one of {', '.join(FLOATS)}")
    path = to_path(path)
    plan = None if mesh is None else make_plan(mesh, compute_dtype=dtype)
    hf = read_hf_config(path)
    return _load_native(path, dtype, plan) if hf is None else _load_hf(path, hf, dtype, plan)


def read_hf_config(path: epath.PathLike) -> dict[str, Any] | None:
    """config.json of a Hugging Face folder; None where `path` is a native folder or a workdir.

    Raises UserError for a path that is neither.
    """
    path = to_path(path)
    if not path.is_dir():
        raise UserError(f"{path} is not a folder")
    if (path / "model.json").exists():
        return None
    if is_workdir(path):
        raise UserError(f"{path} is a workdir without a model (no model.json)")
    if not (path / "config.json").exists():
        raise UserError(f"{path} is neither a Hugging Face folder nor a workdir: no config.json")
    fields = read_json(path / "config.json")
    if "model_type" in fields:
        return fields
    raise UserError(
        f"{path} is neither a Hugging Face folder (no model_type in config.json) nor a workdir with a model"
    )


def _load_hf(path: epath.Path, hf: Mapping[str, Any], dtype: str, plan: Plan | None) -> Model:
    fam = family_for(hf)
    stored = open_tensors(path, hf, jnp.dtype(dtype))
    config = fam.as_stored(fam.from_hf(hf), stored.index)
    decoder = Decoder(config)
    tensors = {fam.canonical(name): name for name in stored}
    if len(tensors) < len(stored):
        raise UserError(f"{path} has tensors that are one in two spellings")
    shapes = flatten(abstract_params(decoder))
    table = fam.tensors(decoder, frozenset(tensors))
    _check_tensors(path, fam, decoder, table, shapes, {name: stored.index[tensors[name]] for name in tensors})
    for note in notes(stored):
        log(f"{path.name}: {note}")
    if config.tie_embeddings and fam.TOP.get("head", "") + ".weight" in tensors:
        _check_tied(path, {name: stored[tensors[f"{fam.TOP[name]}.weight"]] for name in ("embed", "head")})
    _check_copies(path, table, lambda name: stored[tensors[name]])
    found = {(ours, tensor.layer): (tensor, i) for tensor in table for i, ours in enumerate(tensor.paths)}

    def read(ours: str, layer: int | None) -> np.ndarray:
        tensor, i = found[ours, layer]
        sizes = [_inner_shape(shapes, decoder, other, layer) for other in tensor.paths]
        return tensor.form.read([stored[tensors[name]] for name in tensor.names], sizes)[i]

    flat, shardings = {}, _shardings(decoder, plan)
    for ours, shape in shapes.items():
        value = np.empty(shape.shape, jnp.dtype(dtype))
        if ours.startswith("segments/"):
            _, segment, position, inner = ours.split("/", 3)
            for row, layer in enumerate(decoder.groups[int(segment)].layers(int(position))):
                value[row] = read(inner, layer)
        else:
            value[...] = read(ours, None)
        flat[ours] = place(value, shardings[ours])
    tokenizer = path if any((path / name).exists() for name in TOKENIZER_FILES[:2]) else None
    dtypes = {}
    for tensor in fam.tensors(decoder):
        # Written are these names, which the folder may have other ones for.
        source = found[tensor.paths[0], tensor.layer][0].names[0]
        for name in tensor.names:
            dtypes[name] = str(stored.index[tensors[name if name in tensors else source]].dtype)
    return Model(decoder, unflatten(flat), decoder.config, tokenizer, plan=plan, extra=fam.carried(hf), dtypes=dtypes)


def _inner_shape(
    shapes: Mapping[str, jax.ShapeDtypeStruct], decoder: Decoder, ours: str, layer: int | None
) -> tuple[int, ...]:
    """Shape of one layer's parameter, or of one outside of the layers."""
    if layer is None:
        return shapes[ours].shape
    for s, segment in enumerate(decoder.groups):
        for position in range(len(segment.block)):
            if layer in segment.layers(position):
                return shapes[f"segments/{s}/{position}/{ours}"].shape[1:]
    raise ValueError(f"no layer {layer}")


def _check_tensors(
    path: epath.Path,
    fam: Family,
    decoder: Decoder,
    table: list[Tensor],
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    index: Mapping[str, TensorInfo],
) -> None:
    """Raises UserError for a tensor that is missing, unknown, of another shape or of a dtype that is not read."""
    wanted = {
        name: shape
        for tensor in table
        for name, shape in zip(
            tensor.names,
            tensor.form.shapes([_inner_shape(shapes, decoder, ours, tensor.layer) for ours in tensor.paths]),
        )
    }
    for name in wanted:
        if name not in index:
            raise UserError(f"{path} has no tensor {name}")
    for name in index:
        if name not in wanted and not fam.is_derived(name, decoder.config):
            raise UserError(f"{path} has a tensor {name} that the {fam.MODEL_TYPE} family does not have")
    for name, shape in wanted.items():
        if index[name].shape != shape:
            have, asked = list(index[name].shape), list(shape)
            raise UserError(f"{path}: tensor {name} has shape {have}, config.json says {asked}")
        if str(index[name].dtype) not in FLOATS:
            raise UserError(f"{path}: tensor {name} has dtype {index[name].dtype}, not one of {', '.join(FLOATS)}")


def _check_tied(path: epath.Path, tensors: Mapping[str, np.ndarray]) -> None:
    if not np.array_equal(tensors["embed"], tensors["head"]):
        raise UserError(f"{path}: tie_word_embeddings is true, yet lm_head.weight differs from the embedding")


def _check_copies(path: epath.Path, table: list[Tensor], read: Callable[[str], np.ndarray]) -> None:
    """Raises UserError where two tensors of the same parameters differ."""
    first: dict[Any, Tensor] = {}
    for tensor in table:
        other = first.setdefault((tensor.paths, tensor.layer), tensor)
        for name, again in zip(other.names, tensor.names):
            if name != again and not np.array_equal(read(name), read(again)):
                raise UserError(f"{path}: tensors {name} and {again} differ, but are one parameter")


def _shardings(decoder: Decoder, plan: Plan | None) -> dict[str, Any]:
    shapes, config = abstract_params(decoder), decoder.config
    if plan is None:
        return dict.fromkeys(flatten(shapes))
    check_divides(plan, config.cut_sizes())
    return flatten(storage_shardings(declarations(decoder), shapes, plan))


def read_model_config(path: epath.PathLike) -> ModelConfig:
    """The architecture in any of the three kinds of folder, from its small files and the names of its tensors."""
    hf = read_hf_config(path)
    if hf is not None:
        fam = family_for(hf)
        config = fam.from_hf(hf)
        return fam.as_stored(config, read_index(to_path(path))) if has_weights(to_path(path)) else config
    file = epath.Path(path) / "model.json"
    config = bind_config(ModelConfig, read_json(file), where=str(file))
    family(config.family).check(config)
    return config


def read_extra(path: epath.PathLike) -> dict[str, Any]:
    """What `EXTRA` of a native folder or workdir holds; nothing where a model never had any."""
    file = epath.Path(path) / EXTRA
    return read_json(file) if file.exists() else {}


def _load_native(path: epath.Path, dtype: str, plan: Plan | None) -> Model:
    from llm_jax.storage.checkpoints import Checkpoints  # Orbax takes half a second, which config.json alone need not.

    workdir = Workdir(path)
    decoder = Decoder(read_model_config(path))
    checkpoints = Checkpoints(workdir.checkpoints, together=plan is not None)
    step = checkpoints.newest_good()
    if step is None:
        raise UserError(f"{path} has no checkpoint yet")
    meta, shardings = checkpoints.read_meta(step), _shardings(decoder, plan)
    # A run that averages its weights is known by their average, as its evaluation and export are.
    part = "ema" if checkpoints.holds(step, f"ema/{ROLE}") else "params"
    shapes, declared = flatten(abstract_params(decoder)), flatten(declarations(decoder))
    parts = {name: part if declared[name].learned else "model_state" for name in shapes}
    if meta["layout"] == layout(decoder):
        wanted = {
            f"{parts[name]}/{ROLE}/{name}": jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=shardings[name])
            for name, s in shapes.items()
        }
        restored = checkpoints.restore(unflatten(wanted), step, partial=True)
        assert restored is not None
        leaves = flatten(restored[1])
        flat = {name: leaves[f"{parts[name]}/{ROLE}/{name}"].astype(dtype) for name in shapes}
    else:
        saved: dict[str, Any] = {}
        for of in dict.fromkeys(parts.values()):
            saved |= flatten(checkpoints.restore_numpy(step, f"{of}/{ROLE}"))
        regrouped = flatten(regroup(unflatten(saved), meta["layout"], layout(decoder)))
        flat = {name: place(leaf.astype(dtype), shardings[name]) for name, leaf in regrouped.items()}
    tokenizer = workdir.tokenizer if workdir.tokenizer.exists() else None
    hf = meta.get("hf", {})
    return Model(
        decoder,
        unflatten(flat),
        decoder.config,
        tokenizer,
        plan=plan,
        extra=read_extra(path),
        dtypes=hf.get("dtypes"),
    )
