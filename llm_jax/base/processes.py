"""Several processes as one run: how they meet, agree, wait for each other, and end together.

Every process runs the same program. Functions that say "all call it" have to be called by every process, in the same
order, from the main thread; alone, they cost nothing and nothing here imports jax.
"""

import json
import os
import socket
import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from llm_jax.base.errors import UserError
from llm_jax.base.watch import GRACE, TIMEOUT, Watch


class _Group:
    def __init__(self, client: Any, index: int, count: int):
        self.client, self.index, self.count = client, index, count
        self.calls = 0
        # Before anything is waited for.
        self.watch = Watch(client, index, count)
        self.watch.start()
        self.put(f"name/{index}", f"{socket.gethostname()}:{os.getpid()}")
        for p in range(count):
            self.watch.names[p] = f"process {p} ({self.get(f'name/{p}')})"

    def key(self, name: str) -> str:
        self.calls += 1
        return f"{name}/{self.calls}"

    def put(self, key: str, value: str) -> None:
        self.client.key_value_set(key, value)

    def get(self, key: str) -> str:
        from jax.errors import JaxRuntimeError

        while True:
            try:
                # In slices, so that a signal is heard in between.
                return self.client.blocking_key_value_get(key, 1000)
            except JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise


_group: _Group | None = None


def form(client: Any, index: int, count: int) -> None:
    """Makes this process one of several; `client` is jax's, connected. Called by `base.join`."""
    global _group
    _group = _Group(client, index, count)


def several() -> bool:
    return _group is not None


def index() -> int:
    """This process's number, from 0."""
    return 0 if _group is None else _group.index


def count() -> int:
    return 1 if _group is None else _group.count


def first() -> bool:
    """Whether this is process 0, which writes what is written once."""
    return index() == 0


def name(process: int) -> str:
    """`process 2 (host:pid)`."""
    assert _group is not None
    return _group.watch.names[process]


def watch() -> Watch | None:
    """The thread that knows of the others."""
    return None if _group is None else _group.watch


def from_first[T](compute: Callable[[], T], key: str | None = None) -> T:
    """What process 0 computes, in all of them; JSON values. The others wait. All call it.

    With a `key`, which is used once in a run, also from other threads than the main one.
    """
    if _group is None:
        return compute()
    key = _group.key("from_first") if key is None else f"from_first/{key}"
    if _group.index == 0:
        value = compute()
        _group.put(key, json.dumps(value))
        return value
    return json.loads(_group.get(key))


def tell(key: str, value: str) -> None:
    """Gives the others a value; `key` is used once in a run. From any thread, of several processes."""
    assert _group is not None
    _group.put(f"told/{key}/{_group.index}", value)


def told(key: str) -> list[str]:
    """What every process, this one too, told under a key, by process; waits for those that have not yet."""
    assert _group is not None
    return [_group.get(f"told/{key}/{p}") for p in range(_group.count)]


def barrier() -> None:
    """Returns when all processes are here. All call it."""
    if _group is not None:
        _gathered("")


def agree(values: Mapping[str, Any]) -> None:
    """Compares named values over the processes. All call it.

    Raises UserError, in each, naming a process and what it has otherwise than process 0.
    """
    if _group is None:
        return
    everyone = _gathered(json.dumps({field: str(value) for field, value in values.items()}))
    message = from_first(lambda: _difference([json.loads(values) for values in everyone or []]))
    if message:
        raise UserError(message)


def _gathered(value: str) -> list[str] | None:
    """Every process's value, for process 0; the others get None when it has them all."""
    assert _group is not None
    key = _group.key("gathered")
    _group.put(f"{key}/{_group.index}", value)
    if _group.index:
        _group.get(f"{key}/all")
        return None
    values = [_group.get(f"{key}/{p}") for p in range(_group.count)]
    _group.put(f"{key}/all", "")
    return values


def _difference(everyone: list[dict[str, str]]) -> str:
    for p, values in enumerate(everyone):
        fields = [f for f in {**everyone[0], **values} if values.get(f) != everyone[0].get(f)]
        if fields:
            shown = ", ".join(f"{f} is {values.get(f)}, not {everyone[0].get(f)}" for f in fields[:3])
            more = f" and {len(fields) - 3} more" if len(fields) > 3 else ""
            return f"{name(p)} differs from process 0: {shown}{more}"
    return ""


def end(status: int, message: str = "", error: BaseException | None = None) -> None:
    """Called last, with how this process ends; returns alone or with status 0, when all have come to it.

    With another status the others end too. An error of jax may come from the death of another process: then this waits
    until that is clear, and does not return if it is.
    """
    global _group
    if _group is None:
        return
    if status == 0:
        barrier()
        _group.watch.stop()
        _group = None
        import jax

        jax.distributed.shutdown()
        return
    suspect = suspicious(error)
    _group.watch.end(status, message, suspect)
    if suspect:
        _group.watch.guilty.wait(TIMEOUT + 2 * GRACE)


def suspect(error: BaseException) -> None:
    """Says at once that something failed here which the death of another process may explain."""
    if _group is not None and suspicious(error):
        _group.watch.end(1, f"{type(error).__name__}: {error}", True)


def suspicious(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, came from jax's runtime, as a collective's that lost a peer."""
    if error is None:
        return False
    from jax.errors import JaxRuntimeError

    return isinstance(error, JaxRuntimeError) or suspicious(error.__cause__ or error.__context__)


def exit_now(status: int) -> NoReturn:
    """Ends the process without jax's own way out, which waits for the others."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
