"""Where a job's starting model comes from: a parent run, a workdir, or a Hugging Face folder."""

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from etils import epath

from llm_jax.adapters.loading import base_of, has_adapter, merged_model_config
from llm_jax.adapters.peft_files import is_peft_folder, read_config, read_scores
from llm_jax.base.errors import UserError
from llm_jax.data import Tokenizer
from llm_jax.data.tokenizers import has_tokenizer
from llm_jax.models.config import ModelConfig
from llm_jax.models.families import family_for
from llm_jax.models.loading import EXTRA, read_extra, read_hf_config, read_model_config
from llm_jax.storage.atomic import write_atomically
from llm_jax.storage.json_files import read_json
from llm_jax.storage.workdir import Workdir

if TYPE_CHECKING:
    from llm_jax.jobs.graph import Node

GENERATION = "generation_config.json"


@dataclass(frozen=True)
class Origin:
    """A model's small files. A parent that is still to be trained has these already, and no weights yet."""

    path: epath.Path
    tokenizer: epath.Path
    model: ModelConfig
    extra: dict[str, Any]
    """Fields of the config.json it first came with that are none of `model`'s; they go into the export again."""


def write_architecture(workdir: Workdir, model: ModelConfig, extra: Mapping[str, Any]) -> None:
    """Leaves the architecture beside the tokenizer, so that children can be prepared before this run has trained."""
    write_atomically(workdir.path / "model.json", json.dumps(dataclasses.asdict(model), indent=1))
    write_atomically(workdir.path / EXTRA, json.dumps(extra, indent=1))


def token_ids(tokenizer: Tokenizer) -> dict[str, int | None]:
    """The ids that a new model's config.json names. An end token that also fills rows is not called its padding:
    transformers never trains that token's vector (`padding_idx`)."""
    pad = None if tokenizer.pad_id == tokenizer.eos_id else tokenizer.pad_id
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": pad}


def write_generation_config(folder: epath.Path, tokenizer: Tokenizer, parent: Origin | None) -> None:
    """Leaves beside the tokenizer what transformers has to know to stop: the end tokens of the parent and of turns."""
    file = None if parent is None else parent.tokenizer / GENERATION
    fields: dict[str, Any] = read_json(file) if file is not None and file.exists() else dict(token_ids(tokenizer))
    ends = fields.get("eos_token_id")
    known = ends if isinstance(ends, list) else [ends]
    ends = dict.fromkeys([*known, tokenizer.eos_id, tokenizer.end_of_turn_id])
    fields["eos_token_id"] = [end for end in ends if end is not None]
    write_atomically(folder / GENERATION, json.dumps(fields, indent=2))


def origin(parent: "Node | epath.PathLike", field: str, *, own: bool = False) -> Origin:
    """Reads what a parent (a node of the graph or a folder) says of its model.

    Args:
      parent: from `Node.parents`.
      field: the configuration's name for it, for messages.
      own: of a run that trains an adapter, the model that it is on; otherwise the one with the adapter in its weights.

    Raises:
      UserError: a file is missing, or a field of a config.json is not honoured.
    """
    path = epath.Path(parent) if isinstance(parent, str | os.PathLike) else parent.workdir.path
    if is_peft_folder(path):
        base = origin(base_of(path), field)
        tokenizer = path if has_tokenizer(path) else base.tokenizer
        extra = base.extra | read_scores(read_config(path)[1])
        return replace(base, path=path, tokenizer=tokenizer, model=merged_model_config(path, base.model), extra=extra)
    model = read_model_config(path)
    if has_adapter(path) and not own:
        model = merged_model_config(path, model)
    hf = read_hf_config(path)
    folder = Workdir(path).tokenizer if hf is None else path
    extra = read_extra(path) if hf is None else dict(family_for(hf).carried(hf))
    if not has_tokenizer(folder):
        raise UserError(f"{field}: {folder} has no tokenizer.json and no tokenizer.model")
    return Origin(path, folder, model, extra)


def check_tokenizer(model: ModelConfig, vocab_size: int, where: str) -> None:
    """Raises UserError when a tokenizer has ids that the embedding lacks."""
    if model.vocab_size is not None and vocab_size > model.vocab_size:
        raise UserError(
            f"{where}: the tokenizer has {vocab_size} entries, the checkpoint's embedding only {model.vocab_size}"
        )
