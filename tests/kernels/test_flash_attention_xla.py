"""flash_attention by XLA: against float64 in every pair of options, and what no query may see."""

import pytest

from llm_jax.kernels.flash_attention.bounds import Tiles
from tests.conftest import forget_programs
from tests.kernels import devices
from tests.kernels.attention_cases import MASKS, OPTIONS, RISING, SHARED, called, check
from tests.kernels.pairwise import covering, everything

SMALL = {"sizes": [(16, 24)], "dtype": ["float32", "bfloat16", "float16"]}
CASES = covering(OPTIONS | SMALL) + [case | dict(sizes=(16, 24), dtype="float32") for case in SHARED] + [RISING]

LOOPS = Tiles(block=64, tile_mib=1)
WHOLE = Tiles(block=64, tile_mib=1, whole=2048)
WITHOUT_LOOPS = ["none", "segments"]
EACH_KEY_HEAD = Tiles(block=64, tile_mib=1, apart=1)
TAKEN_APART = {"alibi": [False], "sinks": [False]}
WAYS = {LOOPS: "loops", WHOLE: "whole", EACH_KEY_HEAD: "each_key_head"}


def name(case):
    return "-".join(str(x) for x in case.values())


@pytest.mark.parametrize("case", CASES, ids=name)
def test_every_pair_of_options(case):
    check(case, "xla", LOOPS)


@pytest.mark.parametrize("case", [case for case in CASES if case["data"] in WITHOUT_LOOPS], ids=name)
def test_short_rows_without_loops(case):
    check(case, "xla", WHOLE)


@pytest.mark.parametrize("case", covering(OPTIONS | SMALL | TAKEN_APART), ids=name)
def test_each_key_head_by_itself(case):
    check(case, "xla", EACH_KEY_HEAD)


@pytest.mark.slow
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    "tiles, data",
    [*((LOOPS, data) for data in OPTIONS["data"]), *((WHOLE, data) for data in WITHOUT_LOOPS)]
    + [(EACH_KEY_HEAD, data) for data in OPTIONS["data"]],
    ids=lambda x: WAYS[x] if isinstance(x, Tiles) else x,
)
def test_every_combination_of_options(tiles, data, mask):
    """Of `reference` too, in float32, on each way through the tiles that a call may take."""
    one = {"mask": [mask], "data": [data], "sizes": [(16, 24)], "heads": [(2, 1)], "dtype": ["float32"]}
    for case in everything(OPTIONS | one | (TAKEN_APART if tiles is EACH_KEY_HEAD else {})):
        with devices.unoptimized():
            check(case, "xla", tiles, reference=called)
    forget_programs()
