"""What `experiments/scale` reads in a compiled program, on a program written by hand as libtpu writes them."""

import importlib
from pathlib import Path

import pytest

PROGRAM = """HloModule jit_step

%all-reduce-scatter.1 (input.1: bf16[8,4]) -> bf16[2,4] {
  %all-reduce.1 = bf16[8,4]{1,0} all-reduce(%input.1), channel_id=1
  ROOT %dynamic-slice.1 = bf16[2,4]{1,0} dynamic-slice(%all-reduce.1, %zero)
}

%inner_condition (p: (s32[])) -> pred[] {
  ROOT %compare.3 = pred[] compare(%got, %bound), direction=LT
}

%inner_body (p: (s32[])) -> (s32[]) {
  %fusion.3 = f32[4]{0} fusion(%x), kind=kLoop, backend_config={"estimated_cycles":"7"}
}

%condition (p: (s32[])) -> pred[] {
  %three = s32[]{:T(128)} constant(3)
  ROOT %compare.2 = pred[] compare(%got, %three), direction=LT
}

%body (p: (s32[])) -> (s32[]) {
  %fusion.2 = bf16[2,4]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  %all-gather-start.1 = (f32[1]{0}, f32[4]{0}) all-gather-start(%x), channel_id=2
  %all-gather-done.1 = f32[4]{0} all-gather-done(%all-gather-start.1)
  %kernel = f32[4]{0} custom-call(%x), backend_config={"estimated_cycles":"9223372036854775807"}
  %fusion.4 = f32[4]{0} fusion(%x), kind=kLoop, backend_config={"estimated_cycles":"100"}
  %while.2 = (s32[]) while(%t), condition=%inner_condition, body=%inner_body, metadata={op_name="jit(step)/inner"}
}

ENTRY %main (p: f32[4]) -> f32[] {
  %all-reduce.2 = f32[]{} all-reduce(%y), channel_id=3
  %fusion.1 = f32[4]{0} fusion(%p), kind=kLoop, backend_config={"estimated_cycles":"5"}
  %while.1 = (s32[]) while(%t), condition=%condition, body=%body, metadata={op_name="jit(step)/layers"}
}
"""


@pytest.fixture
def hlo_program(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "experiments" / "scale")
    return importlib.import_module("hlo_program")


def test_a_fused_reduce_scatter_counts_as_what_it_is(hlo_program):
    counts = dict.fromkeys(("all-gather", "reduce-scatter", "all-reduce"), 1)
    assert hlo_program.collectives(PROGRAM) == counts | {"all-to-all": 0, "collective-permute": 0}


def test_cycles_count_as_often_as_loops_turn(hlo_program):
    assert hlo_program.cycles(PROGRAM) == (5 + 3 * (100 + 7), ["jit(step)/inner"])
