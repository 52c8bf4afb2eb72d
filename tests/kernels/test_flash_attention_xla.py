"""flash_attention by XLA: against float64 in every pair of options, and what no query may see."""

import pytest

from llm_jax.kernels.flash_attention.bounds import Tiles
from tests.kernels.attention_cases import OPTIONS, RISING, SHARED, check
from tests.kernels.pairwise import covering

SMALL = {"sizes": [(16, 24)], "dtype": ["float32", "bfloat16", "float16"]}
CASES = covering(OPTIONS | SMALL) + [case | dict(sizes=(16, 24), dtype="float32") for case in SHARED] + [RISING]

APART = covering(OPTIONS | SMALL | {"alibi": [False], "sinks": [False]})


def name(case):
    return "-".join(str(x) for x in case.values())


@pytest.mark.parametrize("case", CASES, ids=name)
def test_every_pair_of_options(case):
    check(case, "xla", Tiles(block=64, tile_mib=1))


@pytest.mark.parametrize("case", [case for case in CASES if case["data"] in ("none", "segments")], ids=name)
def test_short_rows_without_loops(case):
    check(case, "xla", Tiles(block=64, tile_mib=1, whole=2048))


@pytest.mark.parametrize("case", APART, ids=name)
def test_each_key_head_by_itself(case):
    check(case, "xla", Tiles(block=64, tile_mib=1, apart=1))
