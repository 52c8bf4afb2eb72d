"""Lines for people, on stderr, from one process of many."""

import sys


def log(text: str) -> None:
    """Prints a line on stderr, flushed, from process 0 only."""
    if _is_first_process():
        print(text, file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """The same, marked as something the reader should look at."""
    log(f"warning: {text}")


def _is_first_process() -> bool:
    # A process that never imported jax, or joined nobody, is alone. `process_index` would start the backends, so it is
    # asked only where they are distributed.
    jax = sys.modules.get("jax")
    return jax is None or not jax.distributed.is_initialized() or jax.process_index() == 0
