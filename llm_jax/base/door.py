"""How every command ends: 0 done, 2 bad input, 75 interrupted with its state saved, 1 anything else."""

import errno
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from types import FrameType

from llm_jax.base.errors import Interrupted, RunError, UserError
from llm_jax.base.platform import choose_platform

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class _Terminated(KeyboardInterrupt):
    """SIGTERM, raised wherever the command is. No Exception, so that nothing takes it for a failure of its own."""


def run_door(main: Callable[[list[str]], None], argv: Sequence[str], *, resumable: bool = False) -> int:
    """Runs a command's `main(argv)` and returns its exit status.

    SIGTERM unwinds the command as Ctrl-C does; code that can do better, such as a training loop, has its own handler
    for a while. A reader of stdout that leaves early (`| head`) ends the command quietly with status 1.

    Args:
        resumable: whether the command, given again, goes on from what it left on disk, as the message then says.
    """
    choose_platform()
    if threading.current_thread() is not threading.main_thread():
        return _run(main, argv, resumable)
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        return _run(main, argv, resumable)
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise _Terminated


def _run(main: Callable[[list[str]], None], argv: Sequence[str], resumable: bool) -> int:
    try:
        main(list(argv))
        sys.stdout.flush()
        return 0
    except (UserError, Interrupted, RunError) as e:
        return _fail(str(e), e.status)
    except _Terminated:
        # A second one, as batch systems send, would only put a traceback in place of the line.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        after = "; the same command continues" if resumable else ""
        return _fail(f"interrupted by SIGTERM{after}", Interrupted.status)
    except KeyboardInterrupt:
        return _fail("interrupted", Interrupted.status)
    except OSError as e:
        if isinstance(e, BrokenPipeError) and _stdout_is_closed():
            return 1
        if e.errno in NO_SPACE:
            return _fail(f"no space left on the disk{f': {e.filename}' if e.filename else ''}", RunError.status)
        traceback.print_exc()
        return 1
    except Exception:
        traceback.print_exc()
        return 1


def _fail(message: str, status: int) -> int:
    print("error: " + " ".join(message.splitlines()), file=sys.stderr, flush=True)
    return status


def _stdout_is_closed() -> bool:
    """Whether it was stdout's reader that left; stdout then leads nowhere, as Python would fail at it again at exit."""
    stdout = select.poll()
    stdout.register(sys.stdout.fileno(), select.POLLOUT)
    if not any(event & select.POLLERR for _, event in stdout.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True
