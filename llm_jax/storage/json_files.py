"""JSON files that somebody else may have written: whatever is wrong with one is one line that names it."""

import json
import os
from typing import Any

from etils import epath

from llm_jax.base.errors import UserError
from llm_jax.storage.pointers import refuse_pointer


def read_json(file: str | os.PathLike[str], kind: type = dict) -> Any:
    """The content of a JSON file.

    Raises:
      UserError: it is missing, a git-LFS pointer, not JSON or not UTF-8, nested too deep, or not of the kind asked for.
    """
    file = epath.Path(file)
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{file} does not exist") from None
    refuse_pointer(file, content)
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON: {error}") from None
    if not isinstance(value, kind):
        raise UserError(f"{file} has to hold a JSON {_NAMES.get(kind, kind.__name__)}, not {type(value).__name__}")
    return value


_NAMES = {dict: "object", list: "list"}
