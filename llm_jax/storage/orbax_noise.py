"""A failed save is one line that `Checkpoints.check` raises; this keeps Orbax and TensorStore from adding to it."""

import functools
import logging
import sys
from typing import Any


@functools.cache
def silence() -> None:
    """Drops what is printed of a save's errors besides; every other message and exception goes where it went before.

    Of a save whose files can't be written, Orbax logs an error, asyncio logs futures whose exceptions nobody waits for,
    and TensorStore's callbacks, which find their event loop closed, end in `sys.unraisablehook`.
    """
    logging.getLogger("absl").addFilter(lambda r: r.levelno < logging.ERROR or "orbax" not in r.pathname)
    logging.getLogger("asyncio").addFilter(lambda r: "exception was never retrieved" not in r.getMessage())
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        value = unraisable.exc_value
        if not (isinstance(value, RuntimeError) and str(value) == "Event loop is closed"):
            before(unraisable)

    sys.unraisablehook = hook
