"""Models from and to files: Hugging Face folders, native folders and workdirs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from llm_jax.base.config import bind as bind_config
from llm_jax.base.errors import UserError
from llm_jax.base.logging import log
from llm_jax.base.progress import Progress
from llm_jax.base.trees import flatten, unflatten
from llm_jax.models.config import ModelConfig
from llm_jax.models.decoder import Decoder, layout
from llm_jax.models.families import family, family_for
from llm_jax.models.hf_folders import FLOATS, HfFolder
from llm_jax.models.parameter import abstract_params, bind, declarations
from llm_jax.models.segments import regroup
from llm_jax.sharding import check_divides, dtype_in_use, make_plan, place, place_pieces, storage_shardings, use
from llm_jax.sharding.config import MeshConfig
from llm_jax.sharding.plan import Plan
from llm_jax.storage.json_files import read_json
from llm_jax.storage.pointers import refuse_pointer
from llm_jax.storage.remote import to_path
from llm_jax.storage.safetensors import has_weights, read_index
from llm_jax.storage.unfinished import refuse_unfinished
from llm_jax.storage.workdir import Workdir, is_workdir

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
"""What comes along with a model and goes back byte for byte, read here or not; and the folder of further templates."""
TEMPLATES = "additional_chat_templates"
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
        """`decoder` is abstract. `tokenizer_dir`: where as many of `TOKENIZER_FILES` lie as there are.
        `extra`: fields of config.json that are none of `config`'s, for `save`.
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
        for a model that ends in logits, and for rows of more documents than `documents`.
        """
        pooled = self.config.head.labels is not None and self.config.head.pooling != "none"
        # What is being traced has no values yet: there, documents beyond are left out, as by `Decoder.scores`.
        if pooled and segment_ids is not None and not isinstance(segment_ids, Tracer):
            there = int(jnp.max(jnp.asarray(segment_ids)))
            if there > documents:
                raise UserError(
                    f"segment_ids go up to {there}, and documents={documents}: the others would get no score"
                )
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
        dtype: of parameters and computation; routers of experts, and the rates of state-space layers, stay float32.
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

    Raises UserError for a path that is neither, or that a conversion was stopped in.
    """
    path = to_path(path)
    if not path.is_dir():
        raise UserError(f"{path} is not a folder")
    refuse_unfinished(path)
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


def check_folder(path: epath.PathLike) -> None:
    """All that `load` finds wrong with a Hugging Face folder before it reads weights; nothing of other folders.

    Raises UserError as `load` does.
    """
    path = to_path(path)
    if (hf := read_hf_config(path)) is not None:
        _open_hf(path, hf, "float32")


def _open_hf(path: epath.Path, hf: Mapping[str, Any], dtype: str) -> HfFolder:
    for name in TOKENIZER_FILES:
        if (path / name).exists():
            with (path / name).open("rb") as stream:
                refuse_pointer(path / name, stream.read(64))
    return HfFolder(path, hf, jnp.dtype(dtype))


def _load_hf(path: epath.Path, hf: Mapping[str, Any], dtype: str, plan: Plan | None) -> Model:
    folder = _open_hf(path, hf, dtype)
    folder.check_copies()
    for note in folder.notes:
        log(f"{path.name}: {note}")
    decoder = folder.decoder
    shardings, flat = _shardings(decoder, plan), {}
    with Progress(f"reading {path.name}") as progress:
        for ours, shape in folder.shapes.items():
            progress.update(total=len(folder.shapes), done=len(flat), parameters=len(flat))
            flat[ours] = place_pieces(shape, shardings[ours], lambda indices, o=ours: folder.pieces(o, indices))
    tokenizer = path if any((path / name).exists() for name in TOKENIZER_FILES) else None
    extra, dtypes = folder.family.carried(hf), folder.dtypes()
    return Model(decoder, unflatten(flat), decoder.config, tokenizer, plan=plan, extra=extra, dtypes=dtypes)


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
    dtypes = {name: dtype_in_use(declared[name].axes, dtype) for name in shapes}
    if meta["layout"] == layout(decoder):
        wanted = {
            f"{parts[name]}/{ROLE}/{name}": jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=shardings[name])
            for name, s in shapes.items()
        }
        cast = unflatten({f"{parts[name]}/{ROLE}/{name}": dtypes[name] for name in shapes})
        restored = checkpoints.restore(unflatten(wanted), step, partial=True, cast=cast)
        assert restored is not None
        leaves = flatten(restored[1])
        flat = {name: leaves[f"{parts[name]}/{ROLE}/{name}"] for name in shapes}
    else:
        saved: dict[str, Any] = {}
        for of in dict.fromkeys(parts.values()):
            saved |= flatten(checkpoints.restore_numpy(step, f"{of}/{ROLE}"))
        regrouped = flatten(regroup(unflatten(saved), meta["layout"], layout(decoder)))
        flat = {name: place(leaf.astype(dtypes[name]), shardings[name]) for name, leaf in regrouped.items()}
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
