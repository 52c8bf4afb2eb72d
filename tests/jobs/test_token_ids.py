"""Which ids a new model's config.json and generation_config.json name."""

import json

import pytest
import tokenizers
from etils import epath

from llm_jax.data.tokenizers import Tokenizer
from llm_jax.jobs.origin import Origin, token_ids, write_generation_config
from llm_jax.models.config import ModelConfig


def words(**special: str) -> Tokenizer:
    entries = {"<end>": 0, "<pad>": 1, "word": 2}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(entries, unk_token="word"))
    backend.decoder = tokenizers.decoders.WordPiece()
    return Tokenizer(backend, {"eos_token": "<end>", **special})


@pytest.mark.parametrize(("special", "pad"), [({"pad_token": "<pad>"}, 1), ({}, None), ({"pad_token": "<end>"}, None)])
def test_an_end_token_is_never_called_padding(special: dict[str, str], pad: int | None, tmp_path):
    tokenizer = words(**special)
    assert tokenizer.pad_id == (1 if pad else 0)
    assert token_ids(tokenizer) == {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": pad}

    # A parent without a generation_config.json does not get one from the rows' padding either.
    bare = Origin(epath.Path(tmp_path), epath.Path(tmp_path), ModelConfig(), {})
    for number, parent in enumerate((None, bare)):
        folder = epath.Path(tmp_path) / str(number)
        folder.mkdir()
        write_generation_config(folder, tokenizer, parent)
        written = json.loads((folder / "generation_config.json").read_text())
        assert (written["pad_token_id"], written["eos_token_id"]) == (pad, [0])


def test_what_the_source_says_of_padding_stays(tmp_path):
    said = {"eos_token_id": 0, "pad_token_id": 0}
    (tmp_path / "generation_config.json").write_text(json.dumps(said))
    source = Origin(epath.Path(tmp_path), epath.Path(tmp_path), ModelConfig(), {})
    own = epath.Path(tmp_path) / "own"
    own.mkdir()
    write_generation_config(own, words(), source)
    assert json.loads((own / "generation_config.json").read_text())["pad_token_id"] == 0
