"""Models named as on the hub, against a made-up cache."""

import json
import pickle
from pathlib import Path

import pytest

from llm_jax.base.errors import UserError
from llm_jax.jobs.external import external_hash, external_model
from tests.storage.hub_cache import COMMIT, lay_out, use_cache

CONFIG = json.dumps({"model_type": "llama"})


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return use_cache(tmp_path / "cache", monkeypatch)


def test_a_name_is_the_snapshot_in_the_cache(cache):
    files = {"config.json": CONFIG, "model.safetensors": b"weights", "tokenizer.json": "{}"}
    snapshot = lay_out(cache, "model", "some/llama", files)
    for name in ("some/llama", f"some/llama@{COMMIT}", "some/llama@main"):
        found = external_model("init_from", name, [Path()])
        assert found == snapshot.resolve()
    before = external_hash(found)
    (snapshot / "model.safetensors").write_bytes(b"others")
    assert external_hash(found) != before


def test_folders_come_before_names(cache, tmp_path):
    lay_out(cache, "model", "some/llama", {"config.json": CONFIG, "model.safetensors": b"w"})
    (tmp_path / "some" / "llama").mkdir(parents=True)
    (tmp_path / "some" / "llama" / "config.json").write_text(CONFIG)
    (tmp_path / "some" / "llama" / "model.safetensors").write_bytes(b"mine")
    assert external_model("init_from", "some/llama", [Path()]) == tmp_path / "some" / "llama"
    # What stands beside it is a mistyped path, not a name.
    with pytest.raises(UserError, match=r"init_from=some/lama is neither .* Hugging Face folder$"):
        external_model("init_from", "some/lama", [Path()])


def test_names_that_give_no_model(cache):
    lay_out(cache, "model", "some/pickled", {"config.json": CONFIG, "pytorch_model.bin": pickle.dumps({})})
    lay_out(cache, "model", "some/empty", {"README.md": "x"})
    for name, message in (
        ("no/such", "neither a config file.*; on its hub: the model no/such is not in the cache, and the hub is out"),
        ("some/empty", "is neither a config file, a workdir nor a Hugging Face folder"),
        ("some/pickled", r"has its weights in pytorch_model.bin, a pickle; only safetensors are read"),
    ):
        with pytest.raises(UserError, match=message) as error:
            external_model("init_from", name, [Path()])
        assert "\n" not in str(error.value)
