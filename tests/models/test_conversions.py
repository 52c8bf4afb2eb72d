"""`python -m llm_jax.convert` there and back: what comes along unchanged, dtypes, what it says, and --verify."""

import contextlib
import errno
import hashlib
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llm_jax import convert
from llm_jax.base import progress
from llm_jax.base.door import run_door
from llm_jax.base.errors import UserError
from llm_jax.models import Decoder, Model, ModelConfig, family, init_params, load, save
from llm_jax.models.head_config import HeadConfig
from llm_jax.models.loading import TEMPLATES, TOKENIZER_FILES
from llm_jax.storage.unfinished import MARK
from tests.storage.fake_store import STORE

SUMMARY = re.compile(r"(\d+) tensors, ([\d,]+) bytes, sha256 ([0-9a-f]{64})")


@pytest.fixture
def source(hf_folder, recipe) -> Path:
    """A Llama with tensors of three dtypes."""
    folder = hf_folder("biases", None, eos_token_id=[3, 5])
    kinds = [np.float32, ml_dtypes.bfloat16, np.float16]
    tensors = {name: array.astype(kinds[i % 3]) for i, (name, array) in enumerate(recipe.weights("biases").items())}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def converted(*arguments: object) -> str:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert run_door(convert.main, [str(argument) for argument in arguments]) == 0
    return said.getvalue()


def tensors(folder: Path) -> dict[str, tuple[str, bytes]]:
    arrays = load_file(folder / "model.safetensors")
    return {name: (str(array.dtype), array.tobytes()) for name, array in arrays.items()}


def beside(folder: Path) -> dict[str, bytes]:
    """Everything but weights and config.json."""
    names = [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]
    return {name: (folder / name).read_bytes() for name in names if not name.startswith(("model.", "config.json"))}


def test_all_of_a_tokenizer_comes_back_byte_for_byte(source, tmp_path):
    rng = np.random.RandomState(0)
    for name in TOKENIZER_FILES:
        # Nobody looks into them: line ends, a byte order mark and bytes that are no text are kept.
        (source / name).write_bytes(b"\xef\xbb\xbf{\r\n" + rng.bytes(99))
    (source / TEMPLATES).mkdir()
    (source / TEMPLATES / "tool_use.jinja").write_text("{{ messages }}\n\n")
    (source / "README.md").write_text("not of the tokenizer")
    converted(source, tmp_path / "native")
    converted(tmp_path / "native", tmp_path / "back")
    expected = beside(source)
    del expected["README.md"]
    assert len(expected) == len(TOKENIZER_FILES) + 1
    assert beside(tmp_path / "back") == expected
    assert tensors(tmp_path / "back") == tensors(source)
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "back", source))
    assert {name: ours[name] for name in theirs} == theirs


def test_without_a_tokenizer(source, tmp_path):
    """Such a folder is a model all the same; what says how it generates comes along."""
    assert not any((source / name).exists() for name in TOKENIZER_FILES)
    expected = load(source)(np.arange(8)[None])
    converted(source, tmp_path / "plain")
    converted(tmp_path / "plain", tmp_path / "back")
    assert beside(tmp_path / "back") == {}
    np.testing.assert_array_equal(load(tmp_path / "back")(np.arange(8)[None]), expected)
    (source / "generation_config.json").write_text('{"eos_token_id": [3, 5]}')
    converted(source, tmp_path / "native")
    converted(tmp_path / "native", tmp_path / "again")
    assert beside(tmp_path / "again") == beside(source)


def test_dtypes_and_the_checksum(source, tmp_path):
    """Each tensor keeps its dtype through float32; the sum is over names, dtypes, shapes and values of both layouts."""
    first = converted(source, tmp_path / "native", "--verify")
    second = converted(tmp_path / "native", tmp_path / "back", "--verify")
    whole, size = hashlib.sha256(), 0
    for name, array in sorted(load_file(source / "model.safetensors").items()):
        size += array.nbytes
        whole.update(f"{name} {array.dtype} {array.shape}\n".encode() + array.tobytes())
    assert {kind for kind, _ in tensors(source).values()} == {"float32", "bfloat16", "float16"}
    assert tensors(tmp_path / "back") == tensors(source)
    for said in (first, second):
        match = SUMMARY.search(said)
        assert match is not None, said
        assert match.groups() == (str(len(tensors(source))), f"{size:,}", whole.hexdigest())
        assert said.splitlines()[-1] == (
            "verify: logits differ by 0.0e+00 of the largest, 16 of 16 greedy tokens are equal"
        )
    low = converted(tmp_path / "native", tmp_path / "low", "--dtype=bfloat16", "--verify")
    assert {kind for kind, _ in tensors(tmp_path / "low").values()} == {"bfloat16"}
    assert json.loads((tmp_path / "low" / "config.json").read_text())["dtype"] == "bfloat16"
    assert re.search(r"verify: logits differ by [1-9]\.\de-0\d of the largest, \d+ of 16", low)
    match = SUMMARY.search(low)
    assert match is not None and match.group(3) != whole.hexdigest()


def test_verify_finds_what_is_not_the_same(source, tmp_path, monkeypatch, capsys):
    """A weight that is changed on the way, too little for a greedy token."""
    reads = []

    def loaded(path, *arguments):
        model = load(path, *arguments)
        if reads:
            model.params["norm"]["weight"] = model.params["norm"]["weight"].at[3].multiply(1 + 1e-6)
        reads.append(path)
        return model

    monkeypatch.setattr("llm_jax.models.loading.load", loaded)
    status = run_door(convert.main, [str(source), str(tmp_path / "native"), "--verify"])
    assert status == 1 and len(reads) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: verify: what was written is not the model that was read: logits differ by")


def test_progress_on_a_terminal(source, tmp_path, monkeypatch):
    """Of reading and writing, each tensor here; on no terminal, nothing for what takes less than 20 s."""
    monkeypatch.setattr(progress, "TERMINAL_SECONDS", -1.0)

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for folder, target in ((source, tmp_path / "native"), (tmp_path / "native", tmp_path / "back")):
        for screen in (Terminal(), io.StringIO()):
            with contextlib.redirect_stderr(screen):
                converted(folder, target)
            lines = re.split(r"\r\x1b\[2K|\n", screen.getvalue())
            if isinstance(screen, Terminal):
                doing = "reading" if folder == source else "writing"
                shown = [line for line in lines if line.startswith(f"{doing} ") and "% · " in line]
                assert len(shown) > 5, lines
                assert any(line.startswith("hashing: ") for line in lines)
                shutil.rmtree(target)
            else:
                assert lines == [""]


SMALL: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24}
SCORES = ModelConfig(**SMALL, num_layers=2, num_heads=2, head=HeadConfig(labels=3))
ENCODER = {"model_type": "modernbert", **SMALL, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.mark.parametrize("config, what", [(SCORES, "scores"), (family("modernbert").from_hf(ENCODER), "logits")])
def test_models_that_predict_no_next_token_are_verified_too(tmp_path, config, what):
    decoder = Decoder(config)
    save(Model(decoder, init_params(decoder, 0), decoder.config), tmp_path / "model")
    said = converted(tmp_path / "model", tmp_path / "native", "--verify")
    assert said.splitlines()[-1] == f"verify: {what} differ by 0.0e+00 of the largest"


def test_to_and_from_an_object_store(source, tmp_path, monkeypatch):
    """Where nothing can be renamed; a store that is full leaves a folder that is not taken for a model."""
    monkeypatch.setattr(STORE, "root", tmp_path / "store")
    monkeypatch.setenv("LLM_JAX_CACHE", str(tmp_path / "cache"))
    for name in ("tokenizer.json", "chat_template.jinja"):
        (source / name).write_text(f'{{"from": "{name}"}}')
    converted(source, "fake://b/native")
    with STORE.failing("*/model.safetensors", errno.ENOSPC):
        assert run_door(convert.main, ["fake://b/native", "fake://b/back"]) == 1
    with pytest.raises(UserError, match="fake://b/back is half written"):
        load("fake://b/back")
    converted("fake://b/native", "fake://b/back")
    converted("fake://b/back", tmp_path / "again")
    converted(tmp_path / "again", tmp_path / "local")
    assert tensors(tmp_path / "local") == tensors(source)
    assert beside(tmp_path / "local") == beside(source)
    assert not any(path.name == MARK for path in (tmp_path / "store").rglob("*"))
