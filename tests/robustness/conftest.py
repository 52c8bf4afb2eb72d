"""A small model as a Hugging Face folder and as a native one."""

from pathlib import Path

import pytest

from llm_jax.data.templating import load_template
from llm_jax.data.tokenizer_training import train_bpe
from llm_jax.data.tokenizers import load_tokenizer
from llm_jax.models import Decoder, Model, init_params, load, save
from llm_jax.models.config import ModelConfig
from llm_jax.models.saving import save_native


def make_folders(folder: Path) -> tuple[Path, Path]:
    """(Hugging Face folder, native folder), both with a tokenizer."""
    tokenizer = train_bpe(["some text to learn a tokenizer from"], 300).with_chat_template(load_template("chatml"))
    config = ModelConfig(
        vocab_size=300, hidden_size=8, intermediate_size=12, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4,
        max_position_embeddings=64,
    )  # fmt: skip
    decoder = Decoder(config)
    tokenizer.save(folder / "tokenizer")
    (folder / "tokenizer" / "generation_config.json").write_text('{"eos_token_id": 1}')
    model = Model(decoder, init_params(decoder, 0), decoder.config, folder / "tokenizer")
    save(model, folder / "hf")
    save_native(load(folder / "hf"), folder / "native")
    assert load_tokenizer(folder / "native" / "tokenizer").vocab_size <= 300
    return folder / "hf", folder / "native"


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_folders(tmp_path_factory.mktemp("models"))
