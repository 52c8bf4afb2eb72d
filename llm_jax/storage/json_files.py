"""JSON files that somebody else may have written: whatever is wrong with one is one line that names it."""

import json
import os
from typing import Any

from etils import epath

from llm_jax.base.errors import UserError


def read_json(file: str | os.PathLike[str], kind: type = dict) -> Any:
    """The content of a JSON file.

    Raises:
      UserError: it is missing, is not JSON or not UTF-8, is nested too deep, or is not of the kind asked for.
    """
    file = epath.Path(file)
    try:
        value = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{file} does not exist") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON: {error}") from None
    if not isinstance(value, kind):
        raise UserError(f"{file} has to hold a JSON {_NAMES.get(kind, kind.__name__)}, not {type(value).__name__}")
    return value


_NAMES = {dict: "object", list: "list"}
