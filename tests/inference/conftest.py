"""A tiny model with the tokenizer that belongs to it, shared by the tests of this folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from llm_jax.data.tokenizer_training import train_bpe
from llm_jax.data.tokenizers import Tokenizer
from llm_jax.models.config import ModelConfig
from llm_jax.models.decoder import Decoder
from llm_jax.models.init import init_params
from llm_jax.models.loading import Model
from llm_jax.models.saving import save

TEXT = "Ben has 23 pencils. Ben gives away 2. Zoë finds 5 more → 26. 😀 The café is naïve.\n"


@dataclass
class TinyModel:
    decoder: Decoder
    params: dict[str, Any]
    config: ModelConfig
    tokenizer: Tokenizer


@pytest.fixture(scope="session")
def tiny() -> TinyModel:
    """Two layers, grouped queries, weights large enough that logits are far from equal."""
    tokenizer = train_bpe([TEXT] * 4, 288)
    decoder = Decoder(
        ModelConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=32,
            intermediate_size=48,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            max_position_embeddings=96,
            init_std=0.3,
        )
    )
    return TinyModel(decoder, init_params(decoder, 0), decoder.config, tokenizer)


@pytest.fixture(scope="module")
def folder(tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of the tiny model without a chat template."""
    path = tmp_path_factory.mktemp("model")
    tiny.tokenizer.save(path / "tokenizer")
    save(Model(tiny.decoder, tiny.params, tiny.config, path / "tokenizer"), path / "hf")
    return path / "hf"
