"""The other side of a benchmark: a process of another Python that does one thing each time it is asked.

Both directions are lines of JSON. A worker script imports this module too (it needs the standard library only), calls
`serve(answer)`, and from then on answers one line on stdout for each line on stdin; what it prints otherwise goes to
stderr.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

MARK = "PEER_WORKER"


class Peer:
    """A running worker. `python` runs `script`, which finds itself asked for by `is_worker()`."""

    def __init__(self, python: str, script: str | Path, *args: str, threads: int = 2):
        limits = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        environment = os.environ | limits | {MARK: "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment.pop("PYTHONPATH", None)
        self._process = subprocess.Popen(
            [python, str(script), *args],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env=environment,
        )
        self.ready = self._read()

    def ask(self, **request: Any) -> dict[str, Any]:
        """Sends a request and waits for its answer."""
        assert self._process.stdin is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return self._read()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"error: the peer's process ended with status {self._process.wait()}")
        return json.loads(line)


def is_worker() -> bool:
    """Whether this process was started by a `Peer`."""
    return MARK in os.environ


def serve(answer: Callable[..., dict[str, Any]], **ready: Any) -> None:
    """In the worker: says `ready`, then answers requests until stdin ends."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    print(json.dumps(ready), file=out)
    for line in sys.stdin:
        print(json.dumps(answer(**json.loads(line))), file=out)


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]
