import json
import os

import numpy as np
import pytest

from llm_jax.base.errors import UserError
from llm_jax.data.tokenizer_training import train_bpe
from llm_jax.data.tokenizers import SPECIALS, Tokenizer, load_tokenizer, tokenizer_manifest

TRICKY = [
    "",
    " ",
    "\n\n  x\t\r\n",
    "12345 and 6.7e-8",
    "naïve café 日本語 👩‍👩‍👧‍👦 \u202e\x00\x1f",
    "a" * 300,
    "'s 'LL don't",
    "<|im_end|> <|pad|>",
]


@pytest.mark.parametrize("split_digits", [True, False])
def test_any_bytes_come_back(texts, split_digits):
    tokenizer = train_bpe(texts, 320, split_digits)
    rng = np.random.default_rng(0)
    samples = [rng.integers(0, 256, n, dtype=np.uint8).tobytes() for n in rng.integers(0, 80, 300)]
    samples += [bytes([b]) for b in range(256)]
    samples += ["日本é👩".encode()[:n] for n in range(13)]  # characters cut in the middle
    for data in samples:
        assert tokenizer.decode_bytes(tokenizer.encode_bytes(data)) == data
        escaped = data.decode("utf-8", "surrogateescape")
        assert tokenizer.decode(tokenizer.encode(escaped), errors="surrogateescape") == escaped


def test_any_text_comes_back(bpe):
    rng = np.random.default_rng(1)
    points = rng.integers(0, 0x110000, (200, 20))
    texts = ["".join(chr(p) for p in row if not 0xD800 <= p < 0xE000) for row in points]
    for text in [*TRICKY, *texts]:
        assert bpe.decode(bpe.encode(text)) == text


def test_training_is_deterministic(texts):
    assert train_bpe(texts, 350).fingerprint == train_bpe(list(texts), 350).fingerprint
    assert train_bpe(texts, 350).fingerprint != train_bpe(texts, 351).fingerprint


def test_digits(texts, bpe):
    assert [bpe.decode([i]) for i in bpe.encode("has 120.")][-5:] == [" ", "1", "2", "0", "."]
    runs = train_bpe(["123 123 123 45 45 45 " * 50], 280, split_digits=False)
    assert len(runs.encode("123")) == 1


def test_special_tokens(bpe, chat_bpe):
    assert [bpe.encode(text) for text in SPECIALS] == [[0], [1], [2], [3]]
    assert (bpe.pad_id, bpe.bos_id, bpe.eos_id) == (0, 1, 1)
    assert bpe.end_of_turn_id == 1  # no chat template: the end of a text ends a turn
    assert chat_bpe.end_of_turn_id == 3
    assert bpe.encode("x", add_special_tokens=True) == [1, *bpe.encode("x")]
    assert bpe.decode([2, *bpe.encode("x"), 3], skip_special_tokens=True) == "x"


def test_token_bytes_count_the_text(bpe):
    for text in TRICKY[:-1]:
        assert bpe.token_bytes[bpe.encode(text)].sum() == len(text.encode())
    assert bpe.token_bytes[[0, 1, 2, 3]].tolist() == [0, 0, 0, 0]


def test_saved_folder_gives_the_same_ids_here_and_in_transformers(chat_bpe, tmp_path):
    transformers = pytest.importorskip("transformers")
    chat_bpe.save(tmp_path)
    ours = load_tokenizer(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert ours.fingerprint == chat_bpe.fingerprint
    assert len(theirs) == ours.vocab_size
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 1, 0)
    for text in TRICKY:
        assert theirs(text)["input_ids"] == ours.encode(text, add_special_tokens=True)
        assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text) == chat_bpe.encode(text)
        assert theirs.decode(ours.encode(text)) == text
    ours.save(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").fingerprint == ours.fingerprint


def test_a_kill_while_saving_leaves_no_tokenizer_or_a_whole_one(chat_bpe, tmp_path, monkeypatch):
    replace, left = os.replace, 0

    def killed(source, target):
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    for files in range(3):
        left = files
        with pytest.raises(KeyboardInterrupt):
            chat_bpe.save(tmp_path)
        assert len(list(tmp_path.iterdir())) == files and not (tmp_path / "tokenizer.json").exists()
    left = 3
    chat_bpe.save(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint == chat_bpe.fingerprint


def test_the_manifest_tells_any_change_of_a_folder(chat_bpe, tmp_path):
    chat_bpe.save(tmp_path)
    made = [tokenizer_manifest(tmp_path)]
    (tmp_path / "special_tokens_map.json").write_text('{"unk_token": "?"}')
    made.append(tokenizer_manifest(tmp_path))
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    made.append(tokenizer_manifest(tmp_path))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 9}))
    made.append(tokenizer_manifest(tmp_path))
    (tmp_path / "tokenizer.json").write_text(train_bpe(["other text " * 20], 265).backend.to_str())
    made.append(tokenizer_manifest(tmp_path))
    assert len({json.dumps(manifest) for manifest in made}) == len(made)
    assert tokenizer_manifest(tmp_path) == made[-1]


def test_bad_input(tmp_path):
    with pytest.raises(UserError, match="tokenizer.vocab_size is 100"):
        train_bpe(["text"], 100)
    with pytest.raises(UserError, match="no text"):
        train_bpe([], 300)
    with pytest.raises(UserError, match=r"has no tokenizer.json$"):
        load_tokenizer(tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"x")
    with pytest.raises(UserError, match="only spiece.model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="is not a tokenizer"):
        load_tokenizer(tmp_path)


def test_half_a_surrogate_pair(bpe):
    with pytest.raises(UserError, match="half of a surrogate pair"):
        bpe.encode("x\ud800")


def test_tokenizer_without_eos_is_refused(bpe):
    with pytest.raises(UserError, match="eos_token"):
        Tokenizer(bpe.backend, {})


def test_many_at_once_are_as_one_by_one(bpe, texts):
    alone = [bpe.encode(text) for text in texts]
    for offsets in (True, False):
        assert [encoding.ids for encoding in bpe.encode_batch(texts, offsets=offsets)] == alone
