"""Models and datasets of the Hugging Face hub, downloaded once into its cache (extra `hub`)."""

import functools
import re
from collections.abc import Sequence
from typing import Literal

from etils import epath

from llm_jax.base.errors import UserError

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


def snapshot(kind: Literal["model", "dataset"], name: str, patterns: Sequence[str], said: str) -> epath.Path:
    """The folder of a repository's files; from the cache alone under HF_HUB_OFFLINE=1 or where the hub is out of reach.

    Args:
      kind: of repository.
      name: `owner/name`, or `owner/name@revision`.
      patterns: which files are fetched; `*` stands for any part of a path.
      said: the setting that names it, for messages.

    Raises:
      UserError: it is neither on the hub nor in the cache, access is refused, or `huggingface_hub` is not installed.
    """
    if not NAME.fullmatch(name):
        raise UserError(f"{said}: {name!r} is no name on the hub: owner/name or owner/name@revision")
    return _snapshot(kind, name, tuple(patterns), said)


@functools.cache
def _snapshot(kind: str, name: str, patterns: tuple[str, ...], said: str) -> epath.Path:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ModuleNotFoundError:
        raise UserError(f"{said} is on the hub, which is read with: pip install 'llm_jax[hub]'") from None
    owner, _, revision = name.partition("@")
    try:
        folder = huggingface_hub.snapshot_download(
            owner, repo_type=kind, revision=revision or None, allow_patterns=list(patterns)
        )
    except huggingface_hub.errors.LocalEntryNotFoundError as error:
        missing = isinstance(error, huggingface_hub.errors.IncompleteSnapshotError)
        state = "only in part in the cache" if missing else "not in the cache"
        raise UserError(f"{said}: the {kind} {name} is {state}, and the hub is out of reach") from None
    except (OSError, ValueError, huggingface_hub.errors.EntryNotFoundError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"{said}: the {kind} {name} cannot be had from the hub: {reason}") from None
    return epath.Path(folder)
