"""`experiments/benchmarks/kernels.py`: its rows are calls that the ops take, a wrong kernel is told, it runs."""

import dataclasses
import importlib
import json
import math
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import jax.numpy as jnp
import pytest

from llm_jax.kernels.cases import Case
from llm_jax.kernels.tuning import tuning_of

BENCHMARKS = Path(__file__).parents[2] / "experiments" / "benchmarks"


@pytest.fixture
def module(monkeypatch):
    """A module of the folder, by name."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


def test_rows_name_sizes_that_the_ops_have(module):
    rows, checks = module("kernel_rows"), module("kernel_checks")
    for size in ("full", "test"):
        for row in [*rows.rows(size), *checks.rows(size)]:
            assert set(row.shape) <= set(tuning_of(row.op).SHAPE), row
    full, test = rows.rows("full"), rows.rows("test")
    assert {(row.op, row.measured, row.goal) for row in full} == {(row.op, row.measured, row.goal) for row in test}
    goals = " ".join(row.goal for row in full)
    assert all(figure in goals for figure in ("cuDNN", "400", "430", "542", "92%", "650", "450", "595", "700", "660"))
    pages = [row.shape for row in full if row.op == "ragged_paged_attention"]
    assert all(2 * 2 * s["requests"] * s["kv_len"] * s["kv_heads"] * s["head_dim"] >= 512 * 10**6 for s in pages)


def test_flops_of_a_part_of_the_gradients(module):
    sides, rows = module("kernel_sides"), module("kernel_rows")
    (row,) = [r for r in rows.rows("test") if r.title == "experts Mixtral, weight gradient"]
    case, shape = sides.case_of(row, "float32")
    assert case.differentiable == (1,)
    assert sides.flops_of(row, case) == 2 * shape["rows"] * shape["inputs"] * shape["outputs"]


def test_a_kernel_that_is_off_is_told(module, monkeypatch):
    checks, rows = module("kernel_checks"), module("kernel_rows")

    def call(x, implementation):
        # In float16, the reference rounds its result and "xla" is off by 1%.
        return x * jnp.asarray(1.01 if implementation == "xla" else 1, x.dtype) / 3

    case = Case((jnp.linspace(1, 2, 100, dtype=jnp.float16),), call, (0,))
    monkeypatch.setattr(checks, "case_of", lambda row, dtype: (case, {}))
    found = {c.result: c for c in checks.check(rows.Row("matmul", "made up", ""), "float16")}
    assert found.keys() == {"out", "d 0"} and not any(c.passed for c in found.values())
    assert found["out"].error == pytest.approx(0.01, rel=0.1) and found["out"].limit < 1e-3
    assert not dataclasses.replace(found["out"], error=math.nan).passed


def test_the_plot_names_every_bar(module):
    text = module("bars").bars({"first": {"ours": 2.0, "theirs": 1.0}, "second": {"ours": 4.0}}, "TFLOP/s")
    root = ElementTree.fromstring(text)
    words = [part.text for part in root if part.tag.endswith("text")]
    assert {"ours", "theirs", "first", "second", "TFLOP/s", "2", "1", "4"} <= set(words)
    widths = [float(part.get("width") or 0) for part in root if part.tag.endswith("rect") and part.get("x") == "330"]
    assert widths[2] == 2 * widths[0] == 4 * widths[1]


@pytest.mark.slow
def test_the_command_at_test_size(tmp_path, module):
    command = [sys.executable, str(BENCHMARKS / "kernels.py"), "--size", "test", "--device-check", "--repeats", "1"]
    command += ["--seconds", "3000", "--out", str(tmp_path)]
    one_device = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    found = subprocess.run(command, capture_output=True, text=True, env=one_device)
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    assert "| ok |" in found.stdout and "OFF" not in found.stdout and "out of time" not in found.stdout
    lines = json.loads((tmp_path / "kernels.json").read_text())
    ours = {line["op"] for line in lines if line["side"].startswith("llm_jax") and line.get("ms")}
    assert ours == {row.op for row in module("kernel_rows").rows("test")} | {"training step"}
    assert (tmp_path / "kernels.md").read_text().splitlines()[0].startswith("cpu")
    ElementTree.fromstring((tmp_path / "kernels.svg").read_text())
