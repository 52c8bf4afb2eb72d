"""Dense checkpoints made into mixtures of experts (arXiv:2212.05055): the same function, in other families' folders."""

import contextlib
import io
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import AutoConfig

from llm_jax import convert
from llm_jax.base.door import run_door
from llm_jax.base.errors import UserError
from llm_jax.models.config import ModelConfig
from llm_jax.models.decoder import Decoder
from llm_jax.models.init import init_params
from llm_jax.models.loading import Model, load
from llm_jax.models.saving import save
from llm_jax.models.upcycling import with_experts

CONFIG = ModelConfig(vocab_size=31, hidden_size=24, intermediate_size=20, num_layers=3, num_heads=4, init_std=0.2)
TOKENS = np.arange(20, dtype=np.int32).reshape(2, 10)


def dense(**changes):
    decoder = Decoder(replace(CONFIG, **changes))
    return Model(decoder, init_params(decoder, 0), decoder.config, extra={"eos_token_id": 3, "pretraining_tp": 1})


@pytest.mark.parametrize(
    "changes, family",
    [
        ({}, "mixtral"),
        ({"family": "mistral", "window": 4}, "mixtral"),
        ({"attention_bias": True}, "llm_jax"),
        ({"family": "qwen3", "qk_norm": "head"}, "qwen3_moe"),
        ({"family": "llm_jax", "gated": False, "mlp_bias": True, "activation": "gelu"}, "llm_jax"),
    ],
)
def test_computes_what_the_dense_model_did(changes, family):
    model = dense(**changes)
    made, want = with_experts(model, 4, 2), np.asarray(model(TOKENS))
    assert made.config.family == family and made.config.experts.num == 4
    np.testing.assert_allclose(made(TOKENS), want, atol=1e-5 * np.abs(want).max())
    apart = with_experts(model, 4, 2, seed=1, noise=0.2)(TOKENS)
    assert np.abs(apart - want).max() > 1e-3 * np.abs(want).max()


def test_by_the_command(tmp_path, capsys):
    model = dense()
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), model.params)
    save(Model(model.decoder, params, model.config, extra=model.extra), tmp_path / "dense", dtype="bfloat16")
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert run_door(convert.main, [str(tmp_path / "dense"), str(tmp_path / "made"), "--experts=4"]) == 0
        assert run_door(convert.main, [str(tmp_path / "made"), str(tmp_path / "hf")]) == 0
    assert "(native layout, family mixtral)" in said.getvalue()
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    theirs = AutoConfig.for_model(**written)
    assert (theirs.num_local_experts, theirs.num_experts_per_tok, theirs.eos_token_id) == (4, 2, 3)
    assert {str(tensor.dtype) for tensor in load_file(tmp_path / "hf" / "model.safetensors").values()} == {"bfloat16"}
    want = np.asarray(load(tmp_path / "dense")(TOKENS))
    np.testing.assert_allclose(load(tmp_path / "hf")(TOKENS), want, atol=1e-5 * np.abs(want).max())
    for flags, message in (
        (["--experts=4", "--top-k=5"], "top_k=5 of 4 experts"),
        (["--experts=many"], "--experts=many is not a number"),
        (["--top-k=2"], "--top-k is of --experts, which is not given"),
    ):
        assert run_door(convert.main, [str(tmp_path / "dense"), str(tmp_path / "other"), *flags]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "other").exists()


def test_refused():
    with pytest.raises(UserError, match="of a dense model; this one has feed_forwards=experts, mtp=0"):
        with_experts(with_experts(dense(), 4, 2), 2, 1)
