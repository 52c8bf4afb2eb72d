"""Datasets of the Hugging Face hub: `hub:OWNER/NAME[@REVISION][/PATH]`."""

import re

from etils import epath

from llm_jax.base.errors import UserError
from llm_jax.storage.hub import snapshot

PREFIX = "hub:"
FORM = re.compile(r"(?P<name>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?(/(?P<inner>.+))?")
CARD = re.compile(r"(readme|license|licence|notice|citation|changelog|contributing)(\..*)?", re.IGNORECASE)


def hub_path(path: str) -> str:
    """Where the files of a `hub:` path lie in the cache, into which they are downloaded first if need be.

    PATH is a file or folder of the repository; its last part may hold `*`. Without one all of it is read.

    Raises:
      UserError: as `storage.hub.snapshot`, or the path has another form.
    """
    match = FORM.fullmatch(path.removeprefix(PREFIX))
    if match is None:
        raise UserError(f"data path {path} has to be hub:OWNER/NAME, hub:OWNER/NAME@REVISION or either with /PATH")
    name, revision, inner = match["name"], match["revision"], match["inner"]
    patterns = ["*"] if inner is None else [inner, f"{inner.rstrip('/')}/*"]
    folder = snapshot("dataset", name + (f"@{revision}" if revision else ""), patterns, f"data path {path}")
    return str(folder if inner is None else folder / inner)


def is_card(root: epath.Path, file: epath.Path) -> bool:
    """Whether a file of a repository tells of the data rather than being of them (README.md and the like)."""
    return file.parent == root and CARD.fullmatch(file.name) is not None
