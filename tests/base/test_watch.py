"""Who is blamed, from signs of life alone: the thread's parts, called by hand with a clock and a store in memory."""

import json

import pytest

from llm_jax.base.watch import DIED, GRACE, SILENT, TIMEOUT, Watch


class Store:
    """The keys of a coordinator, as jax's client gives them."""

    def __init__(self) -> None:
        self.keys: dict[str, str] = {}

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        assert allow_overwrite or key not in self.keys
        self.keys[key] = value

    def key_value_dir_get(self, prefix: str) -> list[tuple[str, str]]:
        return [(key, value) for key, value in self.keys.items() if key.startswith(prefix)]

    def key_value_try_get(self, key: str) -> str:
        return self.keys[key]


class Run:
    """Processes whose threads take turns, a turn per second."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
        self.store, self.time = Store(), 100.0
        monkeypatch.setattr("time.monotonic", lambda: self.time)
        self.watches = [Watch(self.store, i, count) for i in range(count)]
        self.silent: set[int] = set()

    def seconds(self, number: float) -> None:
        for _ in range(round(number)):
            self.time += 1
            for i, watch in enumerate(self.watches):
                if i not in self.silent:
                    watch._say()
                    watch._tell()
                    watch._listen(self.time)

    def verdicts(self) -> list[tuple[int, int, str] | None]:
        found = [w.verdict for i, w in enumerate(self.watches) if i not in self.silent]
        return [None if v is None else (v["process"], v["status"], v["message"]) for v in found]


@pytest.mark.parametrize("dead", [0, 2])
def test_a_silent_process_has_died_in_the_eyes_of_all(monkeypatch, dead):
    run = Run(monkeypatch, 3)
    run.seconds(5)
    run.silent = {dead}
    run.seconds(TIMEOUT - 1)
    assert run.verdicts() == [None, None]
    run.seconds(3)
    assert run.verdicts() == [(dead, 1, SILENT)] * 2


@pytest.mark.parametrize("dead", [0, 2])
def test_a_failed_collective_makes_it_clear_sooner(monkeypatch, dead):
    run = Run(monkeypatch, 3)
    run.seconds(5)
    run.silent = {dead}
    for i in {0, 1, 2} - {dead}:
        run.watches[i].end(1, "JaxRuntimeError: connection closed by peer", True)
    run.seconds(GRACE + 3)
    assert run.verdicts() == [(dead, 1, DIED)] * 2


def test_what_fails_where_nobody_has_died_is_the_failing_ones_fault(monkeypatch):
    run = Run(monkeypatch, 3)
    run.seconds(5)
    run.watches[2].end(1, "JaxRuntimeError: out of memory", True)
    run.seconds(2 * GRACE + 3)
    assert run.verdicts() == [(2, 1, "JaxRuntimeError: out of memory")] * 3


@pytest.mark.parametrize("process", [0, 1])
def test_who_says_why_it_ends_is_believed_at_once(monkeypatch, process):
    run = Run(monkeypatch, 3)
    run.seconds(5)
    run.watches[process].end(2, "train.steps is 0", False)
    run.seconds(2)
    assert run.verdicts() == [(process, 2, "train.steps is 0")] * 3


def test_a_notice_reaches_all_once_and_late_listeners_too(monkeypatch):
    run = Run(monkeypatch, 2)
    heard = []
    run.watches[0].subscribe("stop", lambda text: heard.append((0, text)))
    run.watches[1].notice("stop", "SIGTERM")
    run.seconds(3)
    assert heard == [(0, "SIGTERM")]
    run.watches[1].subscribe("stop", lambda text: heard.append((1, text)))
    run.watches[1].subscribe("other", lambda text: heard.append((2, text)))
    run.seconds(2)
    assert heard == [(0, "SIGTERM"), (1, "SIGTERM")]
    assert json.loads(run.store.keys["alive/1"])["beat"] == 5
