"""Models with adapters, from and to files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Float, Int

from llm_jax.adapters.adapters import Adapters
from llm_jax.adapters.config import LoraConfig
from llm_jax.adapters.merging import merged_config, merged_params, plain_decoder
from llm_jax.adapters.peft_files import (
    BASE,
    Adapter,
    check_tensors,
    is_peft_folder,
    read_adapter,
    read_config,
    write_adapter,
)
from llm_jax.adapters.scores import head_of, of_scores, with_head_of
from llm_jax.adapters.sites import Adaptation
from llm_jax.adapters.start import start_of
from llm_jax.base.config import bind as bind_config
from llm_jax.base.config import to_dict
from llm_jax.base.errors import UserError
from llm_jax.base.trees import flatten, unflatten
from llm_jax.models import loading, saving
from llm_jax.models.config import ModelConfig
from llm_jax.models.decoder import Decoder, layout
from llm_jax.models.loading import ROLE, Model, read_extra
from llm_jax.models.new_head import with_head
from llm_jax.models.parameter import bind
from llm_jax.sharding import place, storage_shardings, use
from llm_jax.sharding.config import MeshConfig
from llm_jax.storage.atomic import write_atomically
from llm_jax.storage.json_files import read_json
from llm_jax.storage.remote import to_path
from llm_jax.storage.workdir import Workdir

OWN = "adapter.json"
"""In the workdir of a run that trains an adapter: its configuration, and the model that it is on."""
DEFAULT = "default"
TOKENIZERS = ("tokenizer.json", "tokenizer.model")


class AdaptedModel(Model):
    """A model with adapters, by name. `params` are those of `decoder`, which has them beside its weights.

    Attributes:
        base: the model alone.
        adapters: their configurations and numbers, by name.
    """

    def __init__(self, base: Model, adapters: Mapping[str, tuple[Adaptation, Adapter]]):
        """Raises UserError for adapters that can't be together (see `Adapters`)."""
        self.base, self.adapters = base, dict(adapters)
        self.all = Adapters(base.decoder, [adaptation for adaptation, _ in adapters.values()])
        self._trees = [_placed(a, adapter.params, base) for a, adapter in adapters.values()]
        self._starts = [_placed(a, start_of(a, base.params), base) for a, _ in adapters.values()]
        params = unflatten(self.all.expand(base.params, self._trees, self._starts))
        super().__init__(
            self.all.decoder, params, base.config, base.tokenizer_dir, plan=base.plan,
            extra=base.extra | {k: v for _, adapter in adapters.values() for k, v in adapter.scores.items()},
            dtypes=base.dtypes,
        )  # fmt: skip
        self._by_row = jax.jit(self._chosen_logits)

    def _chosen_logits(self, params: Any, trees: Any, starts: Any, choice: Array, *inputs: Any) -> Array:
        bound = bind(self.decoder, unflatten(self.all.expand(params, trees, starts, choice=choice)))
        tokens, positions, segment_ids = inputs
        return bound.logits(bound(tokens, positions, segment_ids)[0])

    def __call__(
        self,
        tokens: Int[Any, "B T"],
        positions: Int[Any, "B T"] | None = None,
        segment_ids: Int[Any, "B T"] | None = None,
        adapters: Sequence[str | None] | None = None,
    ) -> Float[Array, "B T V"]:
        """float32 logits. `adapters`: by row the name of its adapter, or None for the model alone; without, every row
        has all of them, added up. Raises UserError for an unknown name, another count than rows, and where the
        adapters are not such that rows can choose."""
        if adapters is None:
            return super().__call__(tokens, positions, segment_ids)
        choice = self.choice(adapters, len(tokens))
        with use(self.plan):
            inputs = self._inputs(tokens, positions, segment_ids)
            return self._by_row(self.base.params, self._trees, self._starts, jnp.asarray(choice), *inputs)

    def choice(self, names: Sequence[str | None], rows: int) -> Float[np.ndarray, "B K"]:
        """float32: by row 1 at the adapter that it names, zeros for None. Raises UserError as a call does."""
        if len(names) != rows:
            raise UserError(f"{len(names)} adapters are named for {rows} rows")
        known = list(self.adapters)
        for name in names:
            if name is not None and name not in known:
                raise UserError(f"there is no adapter {name!r}; there are {', '.join(known)}")
        if any(a.config.use_dora or a.saved for a in self.all.all):
            raise UserError("rows can't choose an adapter with DoRA, or with modules of its own: merge it")
        return np.array([[name == each for each in known] for name in names], np.float32)

    def merged(self) -> Model:
        """The model with the adapters added to its weights: one without adapters that gives the same."""
        with use(self.plan):
            params = jax.jit(partial(merged_params, self.all))(flatten(self.params))
        return Model(
            plain_decoder(self.all, self.base.decoder), params, merged_config(self.all), self.tokenizer_dir,
            plan=self.plan, extra=self.extra, dtypes=self.dtypes,
        )  # fmt: skip


def _placed(adaptation: Adaptation, tree: Mapping[str, Any], base: Model) -> dict[str, Any]:
    """On the model's devices, in the dtype of its weights."""
    if not tree:
        return {}
    dtype = flatten(base.params)["embed/weight"].dtype
    cast = unflatten({path: np.asarray(leaf).astype(dtype) for path, leaf in flatten(tree).items()})
    if base.plan is None:
        return place(cast, None)
    declared = flatten(adaptation.declarations)
    own = unflatten({path: declared[path] for path in flatten(cast)})
    return place(cast, storage_shardings(own, jax.eval_shape(lambda: cast), base.plan))


def load(
    path: epath.PathLike,
    dtype: str = "float32",
    mesh: MeshConfig | None = None,
    *,
    base: epath.PathLike | None = None,
    adapters: Mapping[str, epath.PathLike] | None = None,
) -> Model:
    """The model in a Hugging Face folder, a native folder, a workdir, or a PEFT folder.

    Args:
        path: which of them it is, is recognised. That of an adapter gives an `AdaptedModel`.
        dtype: of parameters and computation; routers of experts stay float32.
        mesh: spreads the parameters over devices, those of all processes, which all call this; None puts them on the
            default one of this process.
        base: the model that the adapter at `path` is on; None takes the one that its folder names.
        adapters: on the model at `path`, by names of your choice: PEFT folders, or workdirs of runs that trained one.

    Raises:
        UserError: as `models.load`; an adapter's files do not fit its model, or the model is not found.
    """
    path = to_path(path)
    if adapters is not None:
        model = load_merged(path, dtype, mesh)
        found = {name: _read(to_path(each), model.decoder, model.params) for name, each in adapters.items()}
        return AdaptedModel(model, found)
    if not has_adapter(path):
        if base is not None:
            raise UserError(f"base={base} is given, but {path} is no adapter")
        return loading.load(path, dtype, mesh)
    model = load_merged(base_of(path, base), dtype, mesh)
    head = head_of(path, model.config)
    if head != model.config.head:
        # What is drawn for it here the adapter has its own values of.
        model = with_head(model, head)
    own = path if is_peft_folder(path) else Workdir(path).tokenizer
    if any((own / name).exists() for name in TOKENIZERS):
        model.tokenizer_dir = own
    return AdaptedModel(model, {DEFAULT: _read(path, model.decoder, model.params)})


def load_merged(path: epath.PathLike, dtype: str = "float32", mesh: MeshConfig | None = None) -> Model:
    """As `load`, with the adapter, where there is one, added to the weights: what jobs start from."""
    model = load(path, dtype, mesh)
    return model.merged() if isinstance(model, AdaptedModel) else model


def has_adapter(path: epath.PathLike) -> bool:
    """Whether `path` is a PEFT folder, or the workdir of a run that trained an adapter."""
    return is_peft_folder(path) or (to_path(path) / OWN).exists()


def base_of(path: epath.PathLike, given: epath.PathLike | None = None) -> epath.Path:
    """Where the model lies that an adapter is on. Raises UserError where the adapter's folder names none that is there.

    A relative path counts from here, or from the folder beside which the adapter lies."""
    path = to_path(path)
    if given is not None:
        return to_path(given)
    name = (read_config(path)[1] if is_peft_folder(path) else read_json(path / OWN)).get(BASE)
    if not name:
        raise UserError(f"{path} does not say which model its adapter is on ({BASE}); give it as base=")
    places = [to_path(name), path.parent / name, path.parent / epath.Path(name).name]
    found = next((each for each in places if each.is_dir()), None)
    if found is None:
        raise UserError(f"{path}: its adapter is on {name}, which is not there; give the model as base=")
    return found


def merged_model_config(path: epath.PathLike, base: ModelConfig) -> ModelConfig:
    """The architecture of what `load_merged` gives of an adapter's folder, on a model of the architecture `base`.

    Raises UserError where the adapter does not fit it."""
    path = to_path(path)
    if is_peft_folder(path):
        config = read_config(path)[0]
    else:
        config = _own_config(path)
    decoder = Decoder(with_head_of(path, base))
    return merged_config(Adapters(decoder, [Adaptation(decoder, config)]))


def _own_config(path: epath.Path) -> LoraConfig:
    return bind_config(LoraConfig, read_json(path / OWN)["config"], where=str(path / OWN))


def write_own(workdir: Workdir, config: LoraConfig, base: epath.PathLike) -> None:
    """Leaves in a workdir what `load` has to know of the adapter that its checkpoints hold."""
    write_atomically(workdir.path / OWN, json.dumps({BASE: str(base), "config": to_dict(config)}, indent=1))


def check_adapter(path: epath.PathLike, model: ModelConfig) -> None:
    """Raises UserError where `load` would find that an adapter's files do not fit a model of this architecture, as far
    as it can be told without the model's weights."""
    path = to_path(path)
    if is_peft_folder(path):
        check_tensors(path, Decoder(model))
    elif has_adapter(path):
        merged_model_config(path, model)
    else:
        raise UserError(f"{path} is neither a PEFT folder nor the workdir of a run that trained an adapter")


def _read(path: epath.Path, decoder: Decoder, base: Mapping[str, Any]) -> tuple[Adaptation, Adapter]:
    return read_adapter(path, decoder, base) if is_peft_folder(path) else _read_own(path, decoder)


def _read_own(path: epath.Path, decoder: Decoder) -> tuple[Adaptation, Adapter]:
    """The adapter in the newest good checkpoint of a run that trained it."""
    from llm_jax.storage.checkpoints import Checkpoints

    if not (path / OWN).exists():
        raise UserError(f"{path} is neither a PEFT folder nor the workdir of a run that trained an adapter")
    config = _own_config(path)
    adaptation, checkpoints = Adaptation(decoder, config), Checkpoints(Workdir(path).checkpoints)
    step = checkpoints.newest_good()
    if step is None:
        raise UserError(f"{path} has no checkpoint yet")
    if checkpoints.read_meta(step)["layout"] != json.loads(json.dumps(layout(decoder))):
        raise UserError(f"{path}: its checkpoint groups the model's layers differently than this version")
    part = "ema" if checkpoints.holds(step, f"ema/{ROLE}") else "params"
    params = checkpoints.restore_numpy(step, f"{part}/{ROLE}")
    return adaptation, Adapter(config, params, scores=of_scores(read_extra(path)))


def save(model: Model, path: epath.PathLike, dtype: str | None = None) -> None:
    """Writes a Hugging Face folder, or of an `AdaptedModel` a PEFT folder; of several adapters one each, by name.

    `dtype` of the tensors; None keeps what each had in the folder it came from, float32 for what is new.
    Raises UserError for a head that the family's folders do not have.
    """
    if not isinstance(model, AdaptedModel):
        saving.save(model, path, dtype)
        return
    path = to_path(path)
    for name, (adaptation, adapter) in model.adapters.items():
        folder = path if len(model.adapters) == 1 else path / name
        write_adapter(folder, adaptation, adapter, model.base.params, None, dtype)
