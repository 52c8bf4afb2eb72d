"""What the command line, the environment and a cluster say of a process."""

import socket

import pytest

from llm_jax.base import coordinator
from llm_jax.base.errors import UserError
from llm_jax.base.join import Place, place

GIVEN = {"coordinator": "10.0.0.1:1234", "processes": "4", "process": "3"}


def test_alone():
    assert place({}, {}) is None
    assert place({**GIVEN, "processes": "1", "process": "0"}, {}) is None
    # An sbatch script without srun is one process, whatever its allocation.
    assert place({}, {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}) is None


def test_flags_environment_and_clusters():
    assert place(GIVEN, {}) == Place("10.0.0.1:1234", 4, 3)
    variables = {"LLM_JAX_COORDINATOR": "a:1", "LLM_JAX_PROCESSES": "2", "LLM_JAX_PROCESS": "0"}
    assert place({}, variables) == Place("a:1", 2, 0)
    assert place({"process": "1"}, variables) == Place("a:1", 2, 1)
    assert place({"processes": "auto"}, {}) == place({}, {"SLURM_STEP_NUM_TASKS": "8"}) == Place()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"process": None}, "--process (or LLM_JAX_PROCESS) is missing"),
        ({"process": "4"}, "--process=4 is not below --processes=4"),
        ({"process": "-1"}, "--process=-1 is not a number"),
        ({"processes": "four"}, "--processes=four is not a number"),
        ({"coordinator": "10.0.0.1"}, "--coordinator=10.0.0.1 is not HOST:PORT"),
        ({"coordinator": ":1234"}, "--coordinator=:1234 is not HOST:PORT"),
    ],
)
def test_mistakes(changed, message):
    with pytest.raises(UserError) as error:
        place({**GIVEN, **changed}, {})
    assert str(error.value).startswith(message)


def test_pods_by_their_environment(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert place({}, {"TPU_WORKER_HOSTNAMES": "a,b"}) == Place()
    assert place({}, {"TPU_WORKER_HOSTNAMES": "a"}) is None
    assert place({}, {"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}) == Place()
    assert place({}, {"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}) is None


def test_a_port_that_another_run_serves_is_not_shared(monkeypatch):
    monkeypatch.setattr(coordinator, "PORT_WAIT", 0.3)
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("", 0))
        other.listen()
        with pytest.raises(OSError, match="in use"):
            coordinator._wait_until_free(other.getsockname()[1])
