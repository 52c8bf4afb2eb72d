"""A cache of the Hugging Face hub laid out by hand, as `huggingface_hub` lays it out, and used without a network."""

import pathlib
from collections.abc import Mapping

import pytest

from llm_jax.storage import hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def lay_out(
    cache: pathlib.Path, kind: str, name: str, files: Mapping[str, str | bytes], revision: str = "main"
) -> pathlib.Path:
    """A repository in a cache: blobs, a snapshot that links to them, and the name of its revision."""
    folder = cache / f"{kind}s--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / COMMIT
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / revision).write_text(COMMIT)
    (folder / "blobs").mkdir()
    for number, (path, text) in enumerate(files.items()):
        blob = folder / "blobs" / f"{number:040d}"
        blob.write_bytes(text.encode() if isinstance(text, str) else text)
        (snapshot / path).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / path).symlink_to(blob)
    return snapshot


def use_cache(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """Makes `huggingface_hub` look there, and nowhere else."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    hub._snapshot.cache_clear()
    return folder
