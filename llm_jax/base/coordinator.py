"""The meeting point of several processes, in a process of its own: it outlives a killed process 0.

jax would run its service inside process 0; when that one is killed, jax aborts the others from C++ with a page of
text before they can say what happened. Here process 0 starts `python -m llm_jax.base.coordinator`, which serves until
its stdin closes (process 0 has ended, however) and nobody is connected any more.
"""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from llm_jax.base.errors import RunError

READY = "ready"
PORT_WAIT = 60.0
"""Seconds in which a port may still be held by the run before."""
LINGER = 60.0
"""Seconds after the end of process 0 in which the others have to find out."""


class Coordinator:
    """Handle of process 0 on the service's process, with the one method that jax calls."""

    def __init__(self, process: subprocess.Popen[str]):
        self._process = process

    def shutdown(self) -> None:
        """Ends the service once everybody has left it."""
        assert self._process.stdin is not None
        self._process.stdin.close()


def launch(address: str, nodes: int, **options: Any) -> Coordinator:
    """Starts the service; takes what jax gives to `get_distributed_runtime_service`.

    Raises RunError where the port is in use.
    """
    # A session of its own: Ctrl-C in a terminal and the signals of batch systems are for those who compute.
    process = subprocess.Popen(
        [sys.executable, "-m", "llm_jax.base.coordinator", json.dumps([address, nodes, options])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"},
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    answer = process.stdout.readline().strip()
    if answer != READY:
        raise RunError(f"no coordinator at {address}: {answer or 'its process ended'}")
    return Coordinator(process)


def serve(address: str, nodes: int, options: dict[str, Any]) -> None:
    """Serves until stdin closes and the last connection is gone, or LINGER seconds have passed since."""
    from jaxlib import _jax  # pyright: ignore[reportAttributeAccessIssue]

    port = int(address.rsplit(":", 1)[1])
    _wait_until_free(port)
    service = _jax.get_distributed_runtime_service(address, nodes, **options)
    print(READY, flush=True)
    sys.stdin.read()
    deadline = time.monotonic() + LINGER
    while _connections(port) and time.monotonic() < deadline:
        time.sleep(0.2)
    del service
    # Its own shutdown waits for processes that are not there any more.
    os._exit(0)


def _wait_until_free(port: int) -> None:
    """gRPC shares ports (SO_REUSEPORT): two runs on one port would each get half of the other's processes."""
    deadline = time.monotonic() + PORT_WAIT
    while True:
        with socket.socket(socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
                return
            except OSError as error:
                if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                    raise
        time.sleep(0.2)


def _connections(port: int) -> int:
    """Established TCP connections to a local port; 0 where there is no /proc."""
    count = 0
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        fields = [line.split() for line in lines]
        # Local address, then remote address, then state: 01 is ESTABLISHED (proc_net_tcp.txt of the kernel).
        count += sum(int(local.rsplit(":", 1)[1], 16) == port and state == "01" for _, local, _, state, *_ in fields)
    return count


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    try:
        serve(*json.loads(sys.argv[1]))
    except OSError as error:
        print(error.strerror.lower() if error.strerror else error, flush=True)
        sys.exit(1)
