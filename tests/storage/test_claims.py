"""The lock on an object store, by processes that race for it, die, stop for a while, or are on another machine."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llm_jax.base.errors import UserError
from llm_jax.storage import claims
from llm_jax.storage.workdir import Workdir
from tests.storage.fake_store import STORE

PROGRAM = """
import sys
sys.path.insert(0, {root!r})
import tests.storage.fake_store
from llm_jax.base.errors import UserError
from llm_jax.storage import claims, holder
from llm_jax.storage.workdir import Workdir
host, *times = sys.argv[1:]
claims.BEAT, claims.STALE, claims.LOOK = map(float, times)
if host:
    holder.socket = type("Sockets", (), dict(gethostname=staticmethod(lambda: host)))
print("ready", flush=True)
for line in sys.stdin:
    try:
        with Workdir(line.strip()).lock():
            print("held", flush=True)
            sys.stdin.readline()
        print("released", flush=True)
    except UserError as error:
        print(error, flush=True)
"""


class Claimant:
    """A process that locks the workdirs it is told to, each until it is told anything."""

    def __init__(self, folder, host="", beat=0.2, stale=1.5, look=0.1):
        program = PROGRAM.format(root=str(Path(__file__).parents[2]))
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, host, *map(str, (beat, stale, look))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"FAKE_STORE": str(folder / "store")},
        )  # fmt: skip

    def hear(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def say(self, line: str = "") -> None:
        assert self.process.stdin
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def ask(self, where: str = "fake://b/run") -> str:
        self.say(where)
        return self.hear()

    def end(self) -> tuple[int, str]:
        """Its status and what it said on stderr."""
        return self.process.wait(60), self.process.communicate()[1]


@pytest.fixture
def claimant(tmp_path, monkeypatch):
    monkeypatch.setattr(STORE, "root", tmp_path / "store")
    made: list[Claimant] = []

    def make(**how) -> Claimant:
        made.append(Claimant(tmp_path, **how))
        assert made[-1].hear() == "ready"
        return made[-1]

    yield make
    for one in made:
        one.process.kill()
        one.process.communicate()


@pytest.mark.parametrize(
    "where, hosts", [("local", [""] * 3), ("fake://b", [""] * 3), ("fake://b", ["a", "b", "c"])], ids=str
)
def test_of_racing_processes_exactly_one_proceeds(claimant, tmp_path, where, hosts):
    """Each of the others is refused and names the winner; 20 races of three."""
    racers = [claimant(host=host, look=0.02) for host in hosts]
    for race in range(20):
        path = f"{where}/{race}" if where.startswith("fake") else str(tmp_path / f"run{race}")
        for racer in racers:
            racer.say(path)
        heard = [racer.hear() for racer in racers]
        (winner,) = [racer for racer, line in zip(racers, heard) if line == "held"]
        host = hosts[racers.index(winner)] or socket.gethostname()
        refused = f"workdir {path} is in use by process {winner.process.pid} on {host}"
        assert sorted(heard) == ["held", refused, refused]
        winner.say()
        assert winner.hear() == "released"


def test_a_killed_process_of_this_machine_is_replaced_at_once(claimant):
    first, second = claimant(stale=1000), claimant(stale=1000)
    assert first.ask() == "held"
    first.process.send_signal(signal.SIGKILL)
    first.process.wait()
    assert second.ask() == "held"
    second.say()
    assert second.hear() == "released"
    assert not list(STORE._keys("fake://b/run/lock"))


def test_another_machine_is_given_time_for_a_sign_of_life(claimant):
    first, second = claimant(host="far"), claimant(host="near")
    assert first.ask() == "held"
    assert second.ask() == f"workdir fake://b/run is in use by process {first.process.pid} on far"
    first.process.send_signal(signal.SIGKILL)
    first.process.wait()
    began = time.monotonic()
    assert second.ask() == "held" and 1.4 < time.monotonic() - began < 10
    second.process.kill()
    said = (
        f"workdir fake://b/run is in use by process {first.process.pid} on far: waiting up to 2 s for a sign of life\n"
    )
    assert second.end()[1] == said * 2


def test_who_was_stopped_too_long_ends_at_once(claimant):
    first, second = claimant(host="far"), claimant(host="near")
    assert first.ask() == "held"
    first.process.send_signal(signal.SIGSTOP)
    assert second.ask() == "held"
    first.process.send_signal(signal.SIGCONT)
    assert first.end() == (1, "error: the lock of workdir fake://b/run was taken over by another process\n")
    assert second.process.poll() is None and len(STORE._keys("fake://b/run/lock")) == 1


def test_a_claim_that_cannot_be_read_is_waited_for(claimant, tmp_path, monkeypatch):
    for name, value in (("STALE", 0.5), ("LOOK", 0.1)):
        monkeypatch.setattr(claims, name, value)
    STORE.put("fake://b/run/lock/0.json", b"{")
    with Workdir("fake://b/run").lock():
        (own,) = STORE._keys("fake://b/run/lock")
        held = json.loads(STORE._file(f"fake://b/run/lock/{own}").read_text())
        assert held["state"] == "holds" and held["pid"] == os.getpid()
        with pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
            with Workdir("fake://b/run").lock():
                pass
    assert not STORE._keys("fake://b/run/lock")


def test_a_holder_shows_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(STORE, "root", tmp_path / "store")
    monkeypatch.setattr(claims, "BEAT", 0.05)
    with Workdir("fake://b/run").lock():
        (own,) = STORE._keys("fake://b/run/lock")
        seen = set()
        deadline = time.monotonic() + 10
        while len(seen) < 4 and time.monotonic() < deadline:
            seen.add(STORE._file(f"fake://b/run/lock/{own}").read_text())
    assert len(seen) == 4
