"""The text every Python carries: the sources of its standard library (about 10 MB, mostly prose and code)."""

import functools
import hashlib
import pathlib
import sysconfig
from typing import Literal, NamedTuple

from llm_jax.base.errors import UserError

Split = Literal["train", "eval"]

# Tables, one huge file of manual pages, what differs by build, and what packagers add or leave out.
SKIPPED_FOLDERS = frozenset(
    {
        "encodings",
        "pydoc_data",
        "test",
        "tests",
        "idle_test",
        "site-packages",
        "dist-packages",
        "__pycache__",
        "lib-dynload",
        "_vendor",
        "_bundled",
        "__phello__",
    }
)
HELD_OUT_PERCENT = 8


class Document(NamedTuple):
    """One module of the standard library."""

    name: str  # "email/parser.py"
    text: str


@functools.cache
def modules() -> tuple[Document, ...]:
    """Every module's source, sorted by name; what is not UTF-8 or is empty is left out.

    Raises:
      UserError: this Python carries no sources.
    """
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if SKIPPED_FOLDERS.intersection(parts) or any(
            part.startswith(("_sysconfigdata_", "config-")) for part in parts
        ):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            found.append(Document("/".join(parts), text))
    if not found:
        raise UserError(
            f"this Python has no standard library sources in {root}: give --config.data.path a text of yours"
        )
    return tuple(found)


@functools.cache
def content_hash() -> str:
    """12 hex digits over names and texts: another Python version is another corpus."""
    digest = hashlib.sha256()
    for name, text in modules():
        digest.update(f"{name}\0{len(text)}\0{text}\0".encode())
    return digest.hexdigest()[:12]


def place(name: str) -> int:
    """A fixed 64-bit number per module name, by which modules are split and ordered."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def split_of(name: str) -> Split:
    """Which side a module is on: a property of its name, so docstrings and text are split alike."""
    return "eval" if place(name) % 100 < HELD_OUT_PERCENT else "train"


def documents(split: Split) -> list[Document]:
    """The modules of one side, in an order that mixes packages (by hash of the name)."""
    return sorted((d for d in modules() if split_of(d.name) == split), key=lambda d: place(d.name) // 100)
