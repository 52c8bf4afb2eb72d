"""kill -9 while it samples, scores and trains: the run ends as the uninterrupted one, bit for bit.

    make test-slow

The first test kills at two moments that it waits for; the slow one at random ones, at least ten of which have to hit,
all over the run.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llm_jax.base.trees import flatten
from llm_jax.jobs.graph import Node
from llm_jax.storage.checkpoints import Checkpoints
from llm_jax.storage.workdir import Workdir
from tests.jobs.alignment.conftest import CONFIG, overrides
from tests.jobs.conftest import CONFIGS

KILLS = 12


def start(workdir: Path, fields: list[tuple[str, str]], config: str = CONFIG) -> subprocess.Popen:
    flags = [f"--config.{name}={value}" for name, value in fields]
    command = [sys.executable, "-m", "llm_jax.main", f"--config={config}", f"--workdir={workdir}", *flags]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def kill(process: subprocess.Popen) -> None:
    assert process.poll() is None, f"the run ended before its kill: {process.communicate()[1].decode()[-2000:]}"
    process.send_signal(signal.SIGKILL)
    process.communicate()


def wait_until(there: Callable[[], bool], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not there() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)


def left(workdir: Path, rounds: int) -> dict[str, object]:
    """What a run leaves that no kill may change."""
    found: dict[str, object] = {}
    for number in range(1, rounds + 1):
        folder = workdir / "rounds" / f"{number:02d}"
        for file in sorted([folder / "pairs.jsonl", *folder.glob("**/chunks/*"), *folder.glob("**/journal/*")]):
            found[str(file.relative_to(workdir))] = file.read_bytes()
        found[f"{number}/eval"] = (folder / "eval.json").read_bytes()
        checkpoints = Checkpoints(Workdir(folder / "run").checkpoints)
        step = checkpoints.newest_good()
        assert step is not None
        for name, array in flatten(checkpoints.restore_numpy(step)).items():
            found[f"{number}/{name}"] = array
        found[f"{number}/metrics"] = _without_times(folder / "run" / "metrics.jsonl")
    return found | {"metrics": _without_times(workdir / "metrics.jsonl")}


def _without_times(file: Path) -> list[dict]:
    records = [json.loads(line) for line in file.read_text().splitlines()]
    return [{name: value for name, value in record.items() if "perf/" not in name} for record in records]


def check_equal(killed: Path, whole: Path, rounds: int) -> None:
    found, wanted = left(killed, rounds), left(whole, rounds)
    assert found.keys() == wanted.keys()
    for name, want in wanted.items():
        if isinstance(want, np.ndarray):
            np.testing.assert_array_equal(found[name], want, err_msg=name)
        else:
            assert found[name] == want, name
    exports = [(folder / "export" / "model.safetensors").read_bytes() for folder in (killed, whole)]
    assert exports[0] == exports[1]


def test_killed_while_it_samples_and_while_it_trains(rounds: Node, chain: dict[str, Node], tmp_path: Path):
    workdir, fields = tmp_path / "killed", overrides(chain)
    first = workdir / "rounds" / "01"
    moments = [
        lambda: (first / "journal" / "000001.jsonl").exists(),
        lambda: (first / "run" / "checkpoints" / "step_00000002" / "commit.json").exists(),
    ]
    reached = []
    for moment in moments:
        process = start(workdir, fields)
        wait_until(moment, process)
        kill(process)
        reached.append(((first / "chunks" / "000000.json").exists(), (first / "eval.json").exists()))
    assert reached == [(True, False)] * 2
    before = (first / "chunks" / "000000.json").stat().st_mtime_ns
    process = start(workdir, fields)
    assert process.wait(timeout=120) == 0, process.communicate()[1].decode()[-2000:]
    process.communicate()
    assert (first / "chunks" / "000000.json").stat().st_mtime_ns == before
    check_equal(workdir, Path(rounds.workdir.path), 2)


LONGER = {
    "iterative": (
        CONFIG,
        {
            "rounds": 6,
            "prompts_per_round": 48,
            "chunk": 4,
            "data.generated.records": 400,
            "preference.train.steps": 60,
            "preference.train.log_every": 7,
        },
    ),
    "online": (
        f"{CONFIGS / 'iterative_dpo.py'}:online_test",
        {
            "sample_every": 2,
            "data.generated.records": 400,
            "preference.train.steps": 200,
            "preference.train.batch_size": 4,
            "preference.train.checkpoint.every": 5,
            "preference.train.log_every": 7,
        },
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("method", LONGER)
def test_killed_at_random_moments(method: str, chain: dict[str, Node], tmp_path: Path):
    config, longer = LONGER[method]
    fields = [*overrides(chain), ("sampling.max_tokens", "24"), *((name, str(x)) for name, x in longer.items())]
    rounds = int(longer.get("rounds", 1))
    process = start(tmp_path / "whole", fields, config)
    assert process.wait() == 0, process.communicate()[1].decode()[-2000:]
    chance, kills, kinds = random.Random(int(os.environ.get("LLM_JAX_KILL_SEED", "0"))), 0, set()
    workdir = tmp_path / "killed"

    def files() -> int:
        return sum(1 for _ in workdir.glob("rounds/**/chunks/*.json")) + sum(
            1 for _ in workdir.glob("rounds/*/run/checkpoints/*/commit.json")
        )

    def kind() -> str:
        """What the run is about, by what is there of its last round."""
        last = max(workdir.glob("rounds/*"), default=workdir)
        if (last / "eval.json").exists():
            return "between rounds"
        journal, chunks = (sum(1 for _ in last.glob(f"**/{name}/0*")) for name in ("journal", "chunks"))
        if journal > chunks:
            return "scoring"
        return "training" if (last / "pairs.jsonl").exists() else "sampling"

    while kills < KILLS:
        process = start(workdir, fields, config)
        before, more = files(), chance.randint(1, 6)
        # Now and then as early as may be, else after some further chunks or checkpoints.
        if kills % 4:
            wait_until(lambda before=before, more=more: files() >= before + more, process)
        time.sleep(chance.uniform(0.0, 0.3 if kills % 4 else 6.0))
        kill(process)
        kinds.add(kind())
        kills += 1
    process = start(workdir, fields, config)
    assert process.wait() == 0, process.communicate()[1].decode()[-2000:]
    assert {"sampling", "training"} <= kinds or {"scoring", "training"} <= kinds, kinds
    check_equal(workdir, tmp_path / "whole", rounds)
