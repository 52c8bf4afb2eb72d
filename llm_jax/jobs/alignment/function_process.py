"""The child's side of `functions.py`: `python -m ... DOTTED.NAME PARENT`, a JSON line in, a JSON line out.

What the function prints goes to stderr, so that it does not get between the lines.
"""

import ctypes
import importlib
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, BinaryIO

_DEATH_SIGNAL = 1  # prctl(2): PR_SET_PDEATHSIG


def main(name: str, parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:  # It ended before it could be heard of.
        return
    # Ctrl-C is the parent's to hear.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    lines = os.fdopen(os.dup(0), "rb")
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    try:
        function = find(name)
    except BaseException as error:
        return _reply(replies, {"error": _said(error)})
    _reply(replies, {})
    for line in lines:
        try:
            _reply(replies, {"value": _plain(function(**json.loads(line)))})
        except BaseException as error:
            _reply(replies, {"error": _said(error)})


def find(name: str) -> Callable[..., Any]:
    """The function of a dotted name. Raises ImportError for a name that leads to none."""
    module, _, attribute = name.rpartition(".")
    if not module:
        raise ImportError("it has to be a dotted name, MODULE.FUNCTION")
    found = getattr(importlib.import_module(module), attribute, None)
    if not callable(found):
        raise ImportError(f"the module {module} has no function {attribute}")
    return found


def _plain(value: Any) -> Any:
    """Arrays and their numbers as Python's; what is no JSON value as its text, which the parent refuses."""
    for method in ("tolist", "item"):
        if hasattr(value, method):
            value = getattr(value, method)()
    if isinstance(value, tuple | list):
        return [_plain(one) for one in value]
    return value if value is None or isinstance(value, int | float | str) else repr(value)


def _said(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".splitlines())


def _reply(replies: BinaryIO, reply: dict[str, Any]) -> None:
    replies.write(json.dumps(reply).encode() + b"\n")
    replies.flush()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
