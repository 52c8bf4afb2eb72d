"""Grouping of layers, and trees taken from one grouping to another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.base.errors import UserError
from llm_jax.models.segments import LayerSpec, group, layout_of, regroup

A, B = LayerSpec(), LayerSpec(mixer="other")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("specs", "expected"),
    [
        ([A] * 4, [(1, 4)]),
        ([A, A, A, B] * 3, [(4, 3)]),
        ([B, A, A, A], [(1, 1), (1, 3)]),
        ([A, B, A, B, A], [(2, 2), (1, 1)]),
        ([A, A, A, A, A, B] * 2 + [A, A], [(6, 2), (1, 2)]),
        ([A], [(1, 1)]),
    ],
)
def test_group(specs, expected):
    segments = group(specs)
    assert [(len(s.block), s.repeats) for s in segments] == expected
    assert [spec for s in segments for spec in s.block * s.repeats] == list(specs)


def test_group_as_told():
    assert layout_of(group([A] * 4, [2, 2])) == {"segments": [[[0, 1]], [[2, 3]]]}
    assert layout_of(group([A, B, A, B], "unrolled")) == {"segments": [[[0]], [[1]], [[2]], [[3]]]}
    assert layout_of(group([A, B, A, B])) == {"segments": [[[0, 2], [1, 3]]]}
    with pytest.raises(UserError, match=r"\[2, 3\] do not add up to the model's 4"):
        group([A] * 4, [2, 3])


@pytest.mark.parametrize("sizes", ["scan", "unrolled", [1, 3], [3, 1]])
def test_regroup_whatever_holds_segments(sizes):
    specs = [A, B, A, B]
    scan, other = layout_of(group(specs)), layout_of(group(specs, sizes))
    layers = {"0": np.array([0.0, 2.0]), "1": np.array([1.0, 3.0])}
    params = {"embed": np.ones(3), "segments": {"0": {k: {"q": {"weight": v}} for k, v in layers.items()}}}
    state = {"params": {"policy": params}, "opt": {"0": {"mu": params}}, "step": np.array(7)}
    there = regroup(state, scan, other)
    moved = there["opt"]["0"]["mu"]["segments"]
    for s, positions in enumerate(other["segments"]):
        for p, rows in enumerate(positions):
            np.testing.assert_array_equal(moved[str(s)][str(p)]["q"]["weight"], rows)
    back = regroup(there, other, scan)
    jax.tree.map(np.testing.assert_array_equal, back, state)
    with pytest.raises(UserError, match="4 layers"):
        regroup(state, scan, layout_of(group([A] * 3)))


def test_regroup_traces():
    scan, unrolled = layout_of(group([A] * 3)), layout_of(group([A] * 3, "unrolled"))
    tree = {"segments": {"0": {"0": {"w": jnp.arange(6.0).reshape(3, 2)}}}}
    out = jax.jit(lambda t: regroup(t, scan, unrolled, jnp.stack))(tree)
    np.testing.assert_array_equal(out["segments"]["2"]["0"]["w"], [[4.0, 5.0]])
