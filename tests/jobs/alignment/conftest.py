"""A run of two rounds at test size, made once for all tests that look at what it leaves."""

import os
from pathlib import Path

import pytest

from llm_jax.jobs.graph import Node, run
from tests.jobs.conftest import CONFIGS

CONFIG = f"{CONFIGS / 'iterative_dpo.py'}:test"


def overrides(chain: dict[str, Node]) -> list[tuple[str, str]]:
    """The model is the tests' own; a mesh of one device, whose programs compile fastest."""
    return [("init_from", str(chain["sft"].workdir.path)), ("mesh.data", "1")]


@pytest.fixture(scope="session")
def rounds(chain: dict[str, Node], tmp_path_factory: pytest.TempPathFactory) -> Node:
    """`configs/iterative_dpo.py:test`, not interrupted."""
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("rounds"))
    try:
        return run(CONFIG, overrides(chain), workdir=str(Path("whole").absolute()))
    finally:
        os.chdir(before)
