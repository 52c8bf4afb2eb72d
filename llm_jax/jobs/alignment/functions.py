"""Anybody's Python function in a process of its own, with a limit of time: it may raise, hang, print or die."""

import contextlib
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from llm_jax.base.errors import UserError

START_SECONDS = 120.0
"""Time for Python to start and the function's module to be imported."""


class CallFailed(Exception):
    """A call that gave no value; the message says why, and reads on from the function's name."""


class FunctionProcess:
    """Calls one function, given by its dotted name, in a child process that is started anew after it had to be ended.

    The child ends with this process, however that ends, so that a function that never returns holds up nobody.
    """

    def __init__(self, name: str, timeout: float):
        self._name, self._timeout = name, timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._rest = b""

    def start(self) -> None:
        """Starts the child. Raises UserError where the function is not there or its module does not import."""
        process = self._process = subprocess.Popen(
            [sys.executable, "-m", "llm_jax.jobs.alignment.function_process", self._name, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(["", *filter(None, sys.path)])},
        )
        self._rest = b""
        try:
            ready = self._read(process, START_SECONDS)
        except CallFailed as failure:
            self.close()
            raise UserError(f"scorer.function={self._name} {failure}") from None
        if "error" in ready:
            self.close()
            raise UserError(f"scorer.function={self._name}: {ready['error']}")

    def call(self, arguments: Mapping[str, Any]) -> Any:
        """What the function returns for keyword arguments, all JSON values. Raises CallFailed, and UserError as
        `start`."""
        if self._process is None:
            self.start()
        process = self._process
        assert process is not None and process.stdin is not None
        try:
            process.stdin.write(json.dumps(dict(arguments)).encode() + b"\n")
            process.stdin.flush()
            reply = self._read(process, self._timeout)
        except BrokenPipeError:
            self.close()
            raise CallFailed("ended its process") from None
        except CallFailed:
            self.close()
            raise
        if "error" in reply:
            raise CallFailed(f"raised {reply['error']}")
        return reply["value"]

    def _read(self, process: subprocess.Popen[bytes], seconds: float) -> dict[str, Any]:
        assert process.stdout is not None
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise CallFailed(f"did not return within {seconds:g} s")
                piece = os.read(process.stdout.fileno(), 1 << 16)
                if not piece:
                    raise CallFailed(f"ended its process with status {process.wait()}")
                self._rest += piece
        line, _, self._rest = self._rest.partition(b"\n")
        return json.loads(line)

    def close(self) -> None:
        """Ends the child at once."""
        if self._process is None:
            return
        process, self._process = self._process, None
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
