"""flash_attention by XLA: against float64 in every pair of options, and what no query may see."""

import pytest

from llm_jax.kernels.flash_attention.bounds import Tiles
from tests.kernels.attention_cases import OPTIONS, RISING, SHARED, check
from tests.kernels.pairwise import covering

SMALL = {"sizes": [(16, 24)], "dtype": ["float32", "bfloat16", "float16"]}
CASES = covering(OPTIONS | SMALL) + [case | dict(sizes=(16, 24), dtype="float32") for case in SHARED] + [RISING]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(x) for x in case.values()))
def test_every_pair_of_options(case):
    check(case, "xla", Tiles(block=64, tile_mib=1))
