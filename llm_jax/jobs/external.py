"""Models that a reference names by folder: workdirs, native folders and Hugging Face folders made elsewhere."""

from collections.abc import Iterable
from pathlib import Path

from etils import epath

from llm_jax.base.errors import UserError
from llm_jax.base.logging import warn
from llm_jax.storage.hashes import canonical_hash, file_fingerprint
from llm_jax.storage.remote import is_remote, to_path
from llm_jax.storage.workdir import Workdir, is_workdir

PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
# What a job reads of a folder besides weights.
DESCRIPTIONS = (
    "config.json",
    "model.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def external_model(field: str, reference: str, folders: Iterable[Path]) -> epath.Path:
    """The folder that `reference` names, absolute or under the first of `folders` that has it.

    Raises UserError if it is not a model that can be read; pickles are never opened.
    """
    said = f"{field}={reference}"
    named = to_path(reference, said)
    places = [named] if is_remote(named) else [epath.Path(folder) / named.expanduser() for folder in folders]
    path = next((place for place in places if place.exists()), None)
    if path is None:
        raise UserError(f"{said} is neither a config file, a workdir nor a Hugging Face folder")
    if not path.is_dir():
        reason = "is a pickle; only safetensors are read" if path.suffix in PICKLED else "is a file, not a folder"
        raise UserError(f"{said} {reason}")
    if not is_remote(path):
        path = epath.Path(Path(path).resolve())
    if is_workdir(path) or (path / "model.json").exists():
        if _newest_commit(path) is None:
            raise UserError(f"{said} is a workdir without a checkpoint")
        if not Workdir(path).done.exists():
            warn(f"{said} is the workdir of a run that has not finished; its newest checkpoint is taken")
        return path
    if any(path.glob("*.safetensors")):
        if not (path / "config.json").exists():
            raise UserError(f"{said} has no config.json")
        return path
    pickles = sorted(p.name for p in path.iterdir() if p.suffix in PICKLED)
    if pickles:
        raise UserError(f"{said} has its weights in {pickles[0]}, a pickle; only safetensors are read")
    if (path / "config.json").exists():
        raise UserError(f"{said} has a config.json but no safetensors")
    raise UserError(f"{said} is neither a config file, a workdir nor a Hugging Face folder")


def external_hash(path: epath.Path) -> str:
    """Stands for the content of a model's folder: descriptions, and weights or the newest checkpoint's own hashes."""
    files = [path / name for name in DESCRIPTIONS]
    if is_workdir(path) or (path / "model.json").exists():
        # A workdir's config.json says where and how it ran; what it holds is in the checkpoint.
        files = [f for f in files if f.name != "config.json"]
        files += [Workdir(path).tokenizer / name for name in DESCRIPTIONS]
        files += [commit for commit in [_newest_commit(path)] if commit is not None]
    else:
        files += [*path.glob("*.safetensors"), *path.glob("*.safetensors.index.json")]
    return canonical_hash({str(f.relative_to(path)): file_fingerprint(f) for f in files if f.exists()})


def _newest_commit(path: epath.Path) -> epath.Path | None:
    """The mark of the newest committed checkpoint, which holds the hashes of all its files."""
    return max(Workdir(path).checkpoints.glob("step_*/commit.json"), key=lambda p: p.parent.name, default=None)
