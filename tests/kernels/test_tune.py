"""`python -m llm_jax.tune`: candidates are run, wrong ones are told, the row is written and read again."""

import dataclasses
import json
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import tune as door
from llm_jax.base.errors import UserError
from llm_jax.base.journal import Journal, run_all
from llm_jax.kernels import cases, choice, tuning
from llm_jax.kernels.cases import Case
from llm_jax.kernels.choice import ArgumentError
from llm_jax.kernels.flash_attention import bounds
from llm_jax.kernels.flash_attention import tuning as attention
from llm_jax.kernels.flash_attention.bounds import Tiles
from llm_jax.kernels.tiles import tiles
from tests.kernels import devices

TINY = "batch=1,q_len=32,heads=1,head_dim=8"


def work(*words):
    """What a process of the command does."""
    with tempfile.TemporaryDirectory() as folder:
        door.main([*words, f"--journal={folder}/journal"])


def tuned(case):
    with tempfile.TemporaryDirectory() as folder:
        return tuning.tune("flash_attention", case, None, repeats=1, journal=Journal(Path(folder, "journal"), 0))


def test_the_row_is_written_and_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(attention, "CANDIDATES", {"xla": ({"block": (8, 16)},)})
    monkeypatch.setattr(bounds, "cores_per_device", lambda: 2)
    path = tmp_path / "tiles.json"
    other = {"op": "ssd", "implementation": "gpu", "device": "x", "dtype": "float32", "shape": "s", "tiles": {}}
    path.write_text(json.dumps([other]))
    for _ in range(2):  # the second run replaces the first one's row
        work("flash_attention", f"--shape={TINY}", "--repeats=2", f"--write={path}")
    kept, row = json.loads(path.read_text())
    assert kept == other
    assert (row["op"], row["implementation"], row["shape"], row["dtype"]) == (
        "flash_attention",
        "xla",
        "hd8",
        "float32",
    )
    assert row["device"] == jax.devices()[0].device_kind
    assert row["tiles"].keys() == {"block", "tile_mib", "whole", "apart"}
    assert 0 < row["ms"] <= row["default_ms"]
    printed = capsys.readouterr().out
    assert "forward and backward" in printed and printed.count("default") >= 2
    assert all(f"| {block} | 16 |" in printed for block in (8, 16, 256))

    monkeypatch.setenv("LLM_JAX_TILES", str(path))
    asked = tiles("flash_attention", "xla", dtype="float32", shape="hd8", default=Tiles(0, 0))
    assert dataclasses.asdict(asked) == row["tiles"]


@dataclasses.dataclass(frozen=True)
class Sizes:
    rows: int = 1


def made_up_case() -> Case:
    """An op whose forward pass asks for one row and whose backward pass for another; sizes 3 are wrong, 4 refused."""

    def sizes(shape: str) -> int:
        return tiles("flash_attention", "xla", dtype="float32", shape=shape, default=Sizes()).rows

    @jax.custom_vjp
    def double(x):
        rows = sizes("forward")
        if rows == 4:
            raise ArgumentError("rows=4 is too many")
        return x * (2.1 if rows == 3 else 2)

    double.defvjp(lambda x: (double(x), None), lambda _, g: (g * 2 * (sizes("backward") != 3),))
    return Case((jnp.arange(3.0) + 1,), lambda x, implementation: double(x), (0,))


def test_each_pass_tunes_its_own_row_and_no_wrong_size_is_timed(monkeypatch):
    monkeypatch.setattr(attention, "CANDIDATES", {"xla": ({"rows": (2, 3, 4), "columns": (1, 2)},)})
    forward, backward = tuned(made_up_case())
    assert (forward.asked.shape, forward.measured) == ("forward", "forward")
    assert (backward.asked.shape, backward.measured) == ("backward", "backward")
    assert [c.sizes.rows for c in forward.candidates] == [1, 2, 3, 4]
    ran, wrong, refused = forward.candidates[:2], forward.candidates[2], forward.candidates[3]
    assert all(c.seconds for c in ran) and forward.best in ran
    assert wrong.seconds is None and wrong.refusal.startswith("wrong: 5.0e-02")
    assert refused.refusal == "refused: rows=4 is too many"
    assert backward.candidates[2].seconds is None and backward.candidates[3].seconds


@dataclasses.dataclass(frozen=True)
class Two:
    first: int = 1
    second: int = 1


def test_groups_are_tuned_one_after_the_other(monkeypatch):
    monkeypatch.setattr(attention, "CANDIDATES", {"xla": ({"first": (1, 2, 3)}, {"second": (1, 2)})})
    monkeypatch.setattr(cases, "enough", lambda call: 1)
    monkeypatch.setattr(cases, "seconds_of", lambda call, count: float(call()[0]))

    def call(x, implementation):
        sizes = tiles("flash_attention", "xla", dtype="", shape="", default=Two())
        return x * (sizes.second + abs(sizes.first - 2)) * 1e-6 + 1

    monkeypatch.setitem(tuning.TOLERANCE, "float32", 1.0)
    (row,) = tuned(Case((jnp.ones(1),), call))
    tried = [(c.sizes.first, c.sizes.second) for c in row.candidates]
    assert tried == [(1, 1), (2, 1), (3, 1), (2, 2)] and row.best.sizes == Two(2, 1)


def test_a_default_that_fails_is_no_candidate_among_others(monkeypatch):
    monkeypatch.setattr(attention, "CANDIDATES", {"xla": ({"rows": (1,)},)})

    def call(x, implementation):
        assert tiles("flash_attention", "xla", dtype="", shape="", default=Sizes(4)).rows != 4, "no room"
        return x

    with pytest.raises(AssertionError, match="no room"):
        tuned(Case((jnp.ones(3),), call))


def test_sizes_that_hang_or_end_their_process_are_left_out(tmp_path, capfd):
    """Rows 2 never come to an end, rows 3 take the process with them."""
    script = tmp_path / "script.py"
    script.write_text(
        """
import dataclasses, os, sys, time
import jax.numpy as jnp
from llm_jax import tune
from llm_jax.kernels.cases import Case
from llm_jax.kernels.flash_attention import tuning
from llm_jax.kernels.tiles import tiles

@dataclasses.dataclass(frozen=True)
class Sizes:
    rows: int = 1

def call(x, implementation):
    rows = tiles("flash_attention", "xla", dtype="", shape="", default=Sizes()).rows
    if rows == 2:
        time.sleep(600)
    if rows == 3:
        os._exit(9)
    return x

tuning.CANDIDATES = {"xla": ({"rows": (2, 3, 4)},)}
tuning.make_case = lambda shape, dtype: Case((jnp.ones(3),), call)
tune.main(sys.argv[1:])
"""
    )
    path, words = tmp_path / "tiles.json", ("flash_attention", "--patience=5", "--repeats=1")
    assert run_all([sys.executable, str(script), *words, f"--write={path}"], tmp_path / "journal") == 0
    (row,) = json.loads(path.read_text())
    assert row["tiles"]["rows"] in (1, 4)
    said = capfd.readouterr()
    for rows, status in ((2, 1), (3, 9)):
        assert f"Sizes(rows={rows}): the process ended with status {status}; another one goes on\n" in said.err
        assert f"| {rows} | hung, or broke its process | | |\n" in said.out


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "one op"),
        (["nothing"], "no op named 'nothing'"),
        (["decode_attention"], "decode_attention has no tile sizes"),
        (["flash_attention", "--implementation=reference", f"--shape={TINY}"], "reference has no tile sizes"),
        (["flash_attention", "--implementation=cuda", f"--shape={TINY}"], "'cuda' is unknown"),
        (["flash_attention", "--shape=head=2"], "'head' is none of .*nearest is heads"),
        (["flash_attention", "--shape=heads=two"], "heads=N"),
        (["flash_attention", f"--shape={TINY},kv_heads=3,heads=2"], "3 heads"),
        (["flash_attention", "--dtype=int8"], "--dtype=int8"),
        (["flash_attention", "--repeats=0"], "--repeats=0"),
        (["flash_attention", "--patience=long"], "--patience=long"),
        (["flash_attention", "--write=pyproject.toml"], "not a table"),
    ],
)
def test_bad_input_is_one_line(words, message):
    with pytest.raises(UserError, match=message) as caught:
        work(*words)
    assert "\n" not in str(caught.value)


def test_visible_pairs_are_those_of_the_mask():
    shape = dict(attention.SHAPE, batch=1, heads=1, q_len=13)
    for changes in ({}, {"causal": 0}, {"kv_len": 20}, {"window": 4}, {"causal": 0, "window": 3}, {"document": 5}):
        asked = {**shape, **changes}
        T, S = asked["q_len"], asked["kv_len"] or asked["q_len"]
        i, j = np.arange(T)[:, None] + S - T, np.arange(S)
        mask = np.ones((T, S), bool)
        if asked["causal"]:
            mask &= j <= i
        if asked["window"]:
            mask &= (j > i - asked["window"]) & (j < i + asked["window"])
        if asked["document"]:
            mask &= i // asked["document"] == j // asked["document"]
        assert attention.visible_pairs(asked) == mask.sum(), changes


OPS = (
    "flash_attention",
    "linear_cross_entropy",
    "grouped_matmul",
    "grouped_swiglu",
    "ssd",
    "selective_scan",
    "ragged_paged_attention",
)
SMALL = {"tokens": 8, "rows": 8, "vocab": 16, "states": 4, "groups": 1}


@pytest.mark.parametrize("op", OPS)
def test_cases_make_calls_that_the_op_takes(op):
    made = tuning.tuning_of(op)
    case = made.make_case({name: SMALL.get(name, min(value, 8)) for name, value in made.SHAPE.items()}, "float32")
    shapes = jax.eval_shape(lambda *arrays: case.call(*arrays, implementation="xla"), *case.arrays)
    outputs = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    inputs = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(case.arrays))
    # Pages that no request has are not read.
    assert case.bytes == inputs + outputs if op != "ragged_paged_attention" else case.bytes <= inputs + outputs
    assert all(jnp.issubdtype(case.arrays[i].dtype, jnp.floating) for i in case.differentiable)
    for name, groups in made.CANDIDATES.items():
        assert name.removesuffix("_backward") in choice.find(op).implementations and isinstance(groups, tuple)


@pytest.mark.parametrize("op", OPS)
def test_hopper_kernels_have_candidates(op):
    """Every row that a call asks for has some, of fields that its sizes have."""
    made = tuning.tuning_of(op)
    case = made.make_case({name: min(value, 64) for name, value in made.SHAPE.items()}, "bfloat16")
    with devices.target(devices.GPU):
        rows = {row for asked in tuning._asked(case, "gpu").values() for row in asked}
    assert rows
    for row in rows:
        tried = {name for group in made.CANDIDATES[row.implementation] for name in group}
        assert tried and tried <= {field.name for field in dataclasses.fields(row.default)}
