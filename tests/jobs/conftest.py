"""The whole chain at test size, run once for all tests that look at what it leaves."""

import os
from pathlib import Path

import pytest

from llm_jax.jobs.graph import Node, run

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Node]:
    """`configs/dpo.py:test` made in an empty folder: its nodes by stage."""
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("chain"))
    try:
        dpo = run(f"{CONFIGS / 'dpo.py'}:test")
    finally:
        os.chdir(before)
    sft = dpo.parents["init_from"]
    assert isinstance(sft, Node)
    base = sft.parents["init_from"]
    assert isinstance(base, Node)
    return {"base": base, "sft": sft, "dpo": dpo}
