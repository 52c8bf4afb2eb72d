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
from typing import NamedTuple

from llm_jax.base import processes
from llm_jax.base.errors import Interrupted, RunError, UserError
from llm_jax.base.platform import choose_platform
from llm_jax.base.runtime import prepare_runtime

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
# What a disk or a store does to a run that has done nothing wrong itself.
DISK = (*NO_SPACE, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.ESTALE)


class _Ending(NamedTuple):
    """How a command ended: its status, and what stderr gets: a line, or a traceback."""

    status: int
    line: str = ""
    error: BaseException | None = None


class _Terminated(KeyboardInterrupt):
    """SIGTERM, raised wherever the command is. No Exception, so that nothing takes it for a failure of its own."""


def run_door(main: Callable[[list[str]], None], argv: Sequence[str], *, resumable: bool = False) -> int:
    """Runs a command's `main(argv)` and returns its exit status.

    SIGTERM unwinds the command as Ctrl-C does; code that can do better, such as a training loop, has its own handler
    for a while. A reader of stdout that leaves early (`| head`) ends the command quietly with status 1.
    One of several processes (`base.processes`) that fails ends the others, and does not return.

    Args:
        resumable: whether the command, given again, goes on from what it left on disk, as the message then says.
    """
    choose_platform()
    prepare_runtime()
    if threading.current_thread() is not threading.main_thread():
        return _report(_run(main, argv, resumable))
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        return _report(_run(main, argv, resumable))
    finally:
        signal.signal(signal.SIGTERM, before)


def disk_failure(error: BaseException) -> str | None:
    """What a disk or a store did, in one line with the file's name; None for an error that is not of their making.

    Libraries in C++ raise other exceptions than OSError, whose text holds the system's own.
    """
    code = error.errno if isinstance(error, OSError) else None
    if code is None:
        code = next((code for code in DISK if os.strerror(code) in str(error)), None)
    if code not in DISK:
        return None
    reason = "no space left on device" if code in NO_SPACE else os.strerror(code).lower()
    filename = getattr(error, "filename", None)
    return f"{reason} at {filename}" if filename else reason


def _terminate(number: int, frame: FrameType | None) -> None:
    if _is_deaf(frame):
        signal.signal(signal.SIGALRM, _terminate)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        return
    raise _Terminated


def _is_deaf(frame: FrameType | None) -> bool:
    """Whether an exception raised here would be printed and forgotten: a finalizer, jax's callback of the collector."""
    while frame is not None:
        if frame.f_code.co_name in ("__del__", "_xla_gc_callback"):
            return True
        frame = frame.f_back
    return False


def _run(main: Callable[[list[str]], None], argv: Sequence[str], resumable: bool) -> _Ending:
    try:
        main(list(argv))
        sys.stdout.flush()
        processes.end(0)
        return _Ending(0)
    except (UserError, Interrupted, RunError) as e:
        return _Ending(e.status, str(e))
    except _Terminated:
        # A second one, as batch systems send, would only put a traceback in place of the line.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        after = "; the same command continues" if resumable else ""
        return _Ending(Interrupted.status, f"interrupted by SIGTERM{after}")
    except KeyboardInterrupt:
        return _Ending(Interrupted.status, "interrupted")
    except OSError as e:
        if isinstance(e, BrokenPipeError) and _stdout_is_closed():
            return _Ending(1)
        return _failed(e)
    except Exception as e:
        return _failed(e)


def _failed(error: Exception) -> _Ending:
    """Status 1: one line for what a disk or a store did, a traceback for a fault of ours."""
    if (reason := disk_failure(error)) is not None:
        return _Ending(RunError.status, reason)
    return _Ending(1, error=error)


def _report(ending: _Ending) -> int:
    if ending.status == 0:
        return 0
    message = " ".join(ending.line.splitlines())
    several = processes.several()
    processes.end(ending.status, message or f"{type(ending.error).__name__}: {ending.error}", ending.error)
    if ending.error is not None:
        traceback.print_exception(ending.error)
    elif message:
        print(f"error: {message}", file=sys.stderr, flush=True)
    if several:
        processes.exit_now(ending.status)
    return ending.status


def _stdout_is_closed() -> bool:
    """Whether it was stdout's reader that left; stdout then leads nowhere, as Python would fail at it again at exit."""
    stdout = select.poll()
    stdout.register(sys.stdout.fileno(), select.POLLOUT)
    if not any(event & select.POLLERR for _, event in stdout.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True
