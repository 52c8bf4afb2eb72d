"""Models made elsewhere: workdirs, native, Hugging Face and PEFT folders, by path or by name on the hub."""

from collections.abc import Iterable
from pathlib import Path

from etils import epath

from llm_jax.base.errors import UserError
from llm_jax.base.logging import warn
from llm_jax.storage import hub
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
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "adapter_config.json",
    "adapter.json",
)
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""Of a PEFT folder."""

# What is fetched of a model on the hub: never a pickle.
HUB_FILES = ("*.safetensors", "*.safetensors.index.json", *DESCRIPTIONS)


def external_model(field: str, reference: str, folders: Iterable[Path]) -> epath.Path:
    """The folder that `reference` names, absolute or under the first of `folders` that has it; else on the hub.

    Raises UserError if it is not a model that can be read; pickles are never opened.
    """
    said = f"{field}={reference}"
    unknown = f"{said} is neither a config file, a workdir nor a Hugging Face folder"
    named = to_path(reference, said)
    places = [named] if is_remote(named) else [epath.Path(folder) / named.expanduser() for folder in folders]
    path = next((place for place in places if place.exists()), None)
    # A path below a folder that is there is a mistyped path, which the hub need not hear of.
    if path is None and hub.NAME.fullmatch(reference) and not any(place.parent.exists() for place in places):
        path = epath.Path(hub.snapshot("model", reference, HUB_FILES, f"{unknown}; on its hub"))
    if path is None:
        raise UserError(unknown)
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
    if (path / ADAPTER).exists():
        if not (path / ADAPTER_WEIGHTS).exists():
            raise UserError(f"{said} has an {ADAPTER} but no {ADAPTER_WEIGHTS}")
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
    raise UserError(unknown)


def check_external(path: epath.Path) -> None:
    """Raises UserError where loading the model would find its files wrong, as far as that can be told at once."""
    # These bring jax, which following references does without.
    from llm_jax.adapters.loading import base_of, has_adapter
    from llm_jax.models.loading import check_folder

    check_folder(base_of(path) if has_adapter(path) else path)


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
    found = {str(f.relative_to(path)): file_fingerprint(f) for f in files if f.exists()}
    if (path / ADAPTER).exists() or (path / "adapter.json").exists():
        from llm_jax.adapters.loading import base_of

        found["base"] = external_hash(base_of(path))
    return canonical_hash(found)


def _newest_commit(path: epath.Path) -> epath.Path | None:
    """The mark of the newest committed checkpoint, which holds the hashes of all its files."""
    return max(Workdir(path).checkpoints.glob("step_*/commit.json"), key=lambda p: p.parent.name, default=None)
