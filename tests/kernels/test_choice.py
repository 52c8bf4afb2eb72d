"""Which implementation runs, how it is told, and that the ops keep their names over their folders'."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from llm_jax import kernels
from llm_jax.kernels.choice import ArgumentError, Op, choose, decide


class Never:
    @staticmethod
    def supports(spec, platform):
        return f"needs a tpu, this is a {platform}"


class Always:
    @staticmethod
    def supports(spec, platform):
        return None


OP = Op("toy", lambda: None, {"fast": Never, "slow": Always}, order=("fast", "slow"))


def test_automatic_choice_falls_through_and_an_explicit_one_does_not(capsys):
    assert choose(OP, None, None) == "slow"
    assert choose(OP, None, None) == "slow"
    assert capsys.readouterr().err.count("toy uses slow") == 1
    with pytest.raises(ArgumentError, match="fast: needs a tpu"):
        choose(OP, None, "fast")
    with pytest.raises(ArgumentError, match="'fats' is unknown"):
        choose(OP, None, "fats")
    assert str(decide(OP, None, None, "cpu")) == "toy: slow (not fast: needs a tpu, this is a cpu)"


def test_explain_and_supports_take_the_calls_own_arguments():
    x = jax.ShapeDtypeStruct((1, 8, 2, 4), jnp.float32)
    choice = kernels.explain("flash_attention", x, x, x, window=4)
    assert choice.implementation == "xla" and "xla comes first" in choice.reasons["reference"]
    assert kernels.explain(kernels.flash_attention, x, x, x, implementation="reference").implementation == "reference"
    assert kernels.supports(kernels.flash_attention, x, x, x, implementation="xla", platform="gpu") is None
    with pytest.raises(ArgumentError, match="window"):
        kernels.explain("flash_attention", x, x, x, window=-1)
    with pytest.raises(ArgumentError, match="flash_atention"):
        kernels.explain("flash_atention", x, x, x)


@pytest.mark.parametrize(
    "first",
    [
        "from llm_jax.kernels import flash_attention",
        "from llm_jax.kernels.flash_attention import flash_attention",
        "from llm_jax.kernels.flash_attention.spec import AttentionSpec",
        "import llm_jax.kernels.flash_attention",
    ],
)
def test_the_op_keeps_its_name_over_its_folders(first):
    code = f"{first}\nfrom llm_jax import kernels\nassert callable(kernels.flash_attention)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_importing_the_package_costs_nothing():
    code = "import sys, llm_jax.kernels\nassert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
