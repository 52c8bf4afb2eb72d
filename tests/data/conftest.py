"""One small tokenizer for all tests of the data room."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import pytest

from llm_jax.data.chat import with_template
from llm_jax.data.config import EmbeddedConfig
from llm_jax.data.embedded.problems import demonstrations, stories
from llm_jax.data.tokenizer_training import train_bpe
from llm_jax.data.tokenizers import Tokenizer

TINY = EmbeddedConfig(records=64, eval_records=16)
PROSE = (
    "Übermut tut selten gut — naïve café, 12 345 π≈3.14159.\n\tdef load(path):\n        return open(path).read()\n" * 4
)


@pytest.fixture(scope="session")
def texts() -> list[str]:
    answers = [record["completion"][0]["content"] for record in demonstrations(TINY, "train")]
    return [PROSE, *(record["text"] for record in stories(TINY, "train")), *answers]


@pytest.fixture(scope="session")
def bpe(texts: list[str]) -> Tokenizer:
    return train_bpe(texts, 400)


@pytest.fixture(scope="session")
def chat_bpe(bpe: Tokenizer) -> Tokenizer:
    return with_template(bpe, "chatml")


@pytest.fixture
def write_jsonl(tmp_path: pathlib.Path) -> Callable[..., str]:
    def write(*records: Any, name: str = "data.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return str(path)

    return write
