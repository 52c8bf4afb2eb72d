"""The launch scripts: every subcommand's dry run, and the whole life of a pod against a `gcloud` that runs locally."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
POD = ["--name", "pod", "--zone", "z"]
COMMAND = [
    "--config=configs/dpo.py:test",
    "--config.data.mixture=[{'path': 'a b', \"weight\": 1}]",
    "--workdir=gs://b/it's",
]
# gcloud that keeps a state file, copies to a folder, and runs what `ssh` is given there.
GCLOUD = """#!/usr/bin/env bash
echo "$*" >> "$FAKE/calls"
shift 3
case $1 in
    create) [ -e "$FAKE/state" ] && exit 1; mkdir -p "$FAKE/host"; echo READY > "$FAKE/state" ;;
    delete) rm -r "$FAKE/state" "$FAKE/host" ;;
    describe) cat "$FAKE/state" ;;
    scp) cp "$2" "$FAKE/host/${3#*:}" ;;
    ssh) for word in "$@"; do
        case $word in --command=*) cd "$FAKE/host" && bash -c "${word#--command=}" ;; esac
    done ;;
esac
"""
# In place of the environment's Python: says what it was given, and ends as a saved run does.
PYTHON = """#!/usr/bin/env bash
trap 'echo saved; exit 75' TERM
printf '<%s>' "$@"; echo
for _ in $(seq 600); do sleep 0.1; done
"""


def launch(*words: str, script: str = "launch/tpu_pod.sh", root: Path = ROOT, **env: str) -> Any:
    command = ["bash", str(root / script), *words]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | env, timeout=60, cwd=root)


def shellcheck() -> str:
    found = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert found, "shellcheck comes with the extra dev"
    return found


def test_shellcheck_finds_nothing():
    scripts = [str(p) for p in (ROOT / "launch").iterdir() if p.suffix in (".sh", ".sbatch")]
    assert len(scripts) == 3
    done = subprocess.run([shellcheck(), *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "words, said",
    [
        (["create", "--type", "v6e-64", "--spot"], "tpu-vm create pod --zone z --accelerator-type=v6e-64"),
        (["create", "--type", "v5p-64", "--project", "p"], "--project p --accelerator-type=v5p-64"),
        (["setup"], "tpu-vm scp"),
        (["run", "--", "--config=configs/dpo.py"], "llm_jax.main"),
        (["logs", "--worker", "3"], "--worker=3 --command=tail"),
        (["status"], "tpu-vm describe pod --zone z"),
        (["stop"], "run.pid"),
        (["delete"], "tpu-vm delete pod --zone z --quiet"),
    ],
)
def test_dry_run(words: list[str], said: str):
    separator = words.index("--") if "--" in words else len(words)
    done = launch(*words[:separator], *POD, "--dry-run", *words[separator:], PATH="/usr/bin:/bin")
    assert done.returncode == 0, done.stderr
    assert said in done.stdout.replace("\\ ", " ")


@pytest.mark.parametrize(
    "words, said",
    [
        ([], "a command is missing"),
        (["launch"], "unknown command launch"),
        (["create", "--zone", "z"], "--name is missing"),
        (["create", "--name", "n"], "--zone is missing"),
        (["create", *POD], "--type is missing"),
        (["create", *POD, "--type", "v9-8"], "no runtime is known for --type v9-8"),
        (["create", *POD, "--type"], "--type needs a value"),
        (["create", "--name", "--zone", "z"], "--name needs a value"),
        (["create", *POD, "--tpye", "v6e-8"], "unknown argument --tpye"),
        (["stop", "logs", *POD], "two commands: stop and logs"),
        (["run", *POD], "run needs the training command's arguments"),
        (["stop", *POD, "--", "x"], "stop takes nothing after --"),
        (["resume", *POD], "nothing was run under the name pod"),
    ],
)
def test_mistakes(words: list[str], said: str):
    done = launch(*words, "--dry-run") if "--" not in words else launch("--dry-run", *words)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ") and said in done.stderr


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A small repository with the launch folder, whose environment is a stand-in for Python."""
    root = tmp_path / "checkout"
    shutil.copytree(ROOT / "launch", root / "launch")
    (root / "launch" / "environment.sh").write_text(
        f"mkdir -p $1/bin; cat > $1/bin/python <<'EOF'\n{PYTHON}EOF\nchmod +x $1/bin/python\n"
    )
    for words in (["init", "-q"], ["add", "."]):
        subprocess.run(["git", *words], cwd=root, check=True, env=os.environ | {"GIT_CONFIG_GLOBAL": os.devnull})
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gcloud").write_text(GCLOUD)
    (tmp_path / "bin" / "gcloud").chmod(0o755)
    return root


def until(condition, seconds: float = 20) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.05)


def test_life_of_a_pod(checkout: Path, tmp_path: Path):
    env = {"FAKE": str(tmp_path), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    state, log, status = (tmp_path / name for name in ("state", "host/llm_jax/run.log", "host/llm_jax/run.status"))

    def pod(command: str, *words: str) -> Any:
        done = launch(command, *POD, "--type", "v6e-8", *words, root=checkout, **env)
        assert done.returncode == 0, done.stderr
        return done

    given = "".join(f"<{word}>" for word in ("-m", "llm_jax.main", *COMMAND))
    pod("create")
    pod("setup")
    pod("run", "--", *COMMAND)
    until(lambda: log.exists() and given in log.read_text())
    assert "running" in pod("status").stdout
    pod("stop")
    until(status.exists)
    assert status.read_text() == "75\n" and "saved" in log.read_text()
    # Preempted: the same run on a new pod, with the arguments of before.
    state.write_text("PREEMPTED\n")
    log.unlink()
    pod("resume")
    until(lambda: log.exists() and given in log.read_text())
    assert state.read_text() == "READY\n"
    pod("stop")
    pod("delete")
    assert not state.exists()


def test_slurm_dry_run_keeps_every_word():
    words = ["--config=configs/sft.py", "--config.x=(1, 2)"]
    done = launch("--dry-run", *words, script="launch/slurm.sbatch")
    echoed = subprocess.run(["bash", "-c", f"printf '%s\\n' {done.stdout}"], capture_output=True, text=True).stdout
    assert echoed.splitlines()[-2:] == words
    contained = launch("--dry-run", *words, script="launch/slurm.sbatch", LLM_JAX_IMAGE="img")
    assert "--container-image=img python -m" in contained.stdout
    assert launch("--dry-run", script="launch/slurm.sbatch").returncode == 2


@pytest.mark.parametrize("status, requeued", [(75, True), (0, False), (1, False)])
def test_slurm_requeues_what_was_saved(tmp_path: Path, status: int, requeued: bool):
    for name, text in {"srun": f"exit {status}", "scontrol": f'echo "$*" > {tmp_path}/requeued'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7"}
    done = launch("--config=configs/sft.py", script="launch/slurm.sbatch", root=ROOT, **env)
    assert done.returncode == status
    assert (tmp_path / "requeued").exists() == requeued
