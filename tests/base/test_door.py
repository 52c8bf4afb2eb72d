import errno
import os
import signal
import subprocess
import sys

import pytest

from llm_jax.base.door import run_door
from llm_jax.base.errors import Interrupted, RunError, UserError


@pytest.mark.parametrize(
    "error, status, line",
    [
        (UserError("config.x=1: no such field"), 2, "error: config.x=1: no such field\n"),
        (UserError("two\nlines"), 2, "error: two lines\n"),
        (Interrupted("stopped at step 3"), 75, "error: stopped at step 3\n"),
        (KeyboardInterrupt(), 75, "error: interrupted\n"),
        (RunError("NaN at step 3"), 1, "error: NaN at step 3\n"),
        (OSError(errno.ENOSPC, "No space left on device", "a/file"), 1, "error: no space left on device at a/file\n"),
    ],
)
def test_status_and_one_line(error, status, line, capsys):
    def main(argv):
        raise error

    assert run_door(main, []) == status
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("resumable, after", [(True, "; the same command continues"), (False, "")])
def test_sigterm_unwinds_and_is_one_line(resumable, after, capsys):
    unwound = []

    def main(argv):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        except Exception:
            unwound.append("taken for a failure")
        finally:
            unwound.append("cleaned up")

    before = signal.getsignal(signal.SIGTERM)
    assert run_door(main, [], resumable=resumable) == 75
    assert capsys.readouterr().err == f"error: interrupted by SIGTERM{after}\n"
    assert unwound == ["cleaned up"]
    assert signal.getsignal(signal.SIGTERM) == before


def test_sigterm_in_a_finalizer_is_not_lost(capsys):
    class Finalized:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)

    def main(argv):
        del argv[:]
        Finalized()
        signal.pause()

    assert run_door(main, ["x"]) == 75
    assert capsys.readouterr().err == "error: interrupted by SIGTERM\n"


def test_a_handler_set_for_a_while_has_precedence():
    def main(argv):
        seen = []
        before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
        os.kill(os.getpid(), signal.SIGTERM)
        signal.signal(signal.SIGTERM, before)
        assert seen == [signal.SIGTERM]

    assert run_door(main, []) == 0


def test_anything_else_shows_its_traceback(capsys):
    assert run_door(lambda argv: print(argv[1]), ["only one"]) == 1
    assert "IndexError" in capsys.readouterr().err


def test_done(capsys):
    assert run_door(lambda argv: print(argv[0]), ["hello"]) == 0
    assert capsys.readouterr().out == "hello\n"


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_reader_that_leaves_is_no_traceback(lines):
    program = f"""
import sys
from llm_jax.base.door import run_door
sys.stdin.read()
sys.exit(run_door(lambda argv: print("line\\n" * {lines}), []))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdin and process.stdout and process.stderr
    process.stdout.close()
    process.stdin.close()
    error = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 1
    assert error == b""
