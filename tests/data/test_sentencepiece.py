# pyright: reportAttributeAccessIssue=false
# (what protobuf and `tokenizers` make at run time, their stubs do not tell)
"""SentencePiece vocabularies: ids as the `sentencepiece` library's, here and in transformers."""

import io
import json
import random

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as schema

from llm_jax.base.errors import UserError
from llm_jax.data import sentencepiece_models
from llm_jax.data.chat import render, with_template
from llm_jax.data.tokenizer_training import train_sentencepiece
from llm_jax.data.tokenizers import load_tokenizer, tokenizer_manifest

ODD = "日本語 naïve ½ ﬁ ﾊﾞ e\u0301 👩‍👩‍👧 \u200b\u202e ▁ <0x41> 12345 \t\n  x\r\n{}[]<>"
ALPHABET = "abcdé日本👩\u200d\t\n  <>0123½\u0301\x01.,"


@pytest.fixture(scope="module")
def corpus(texts):
    return [*texts, ODD * 40, "def f(x):\n    return x + 1\n\n" * 60, *("  " * n + "aaaa bbb" for n in range(40))]


@pytest.fixture(scope="module")
def samples(corpus):
    rng = random.Random(0)
    made = ["".join(rng.choices(ALPHABET, k=rng.randint(0, 60))) for _ in range(1000)]
    runs = [letter * n for letter in "a 0\n" for n in range(30)]
    return [*made, *runs, *corpus[:200], ODD, " " + ODD, "", " "]


def trained(corpus, kind, **options):
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus), model_writer=out, model_type=kind, vocab_size=700, hard_vocab_limit=False,
        minloglevel=2, max_sentence_length=100_000, **options,
    )  # fmt: skip
    return out.getvalue()


LLAMA = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}
OPTIONS = {
    "llama": LLAMA,  # a dummy prefix
    "gemma": {**LLAMA, "add_dummy_prefix": False, "user_defined_symbols": ["\n\n", "<tag>"]},
    "no bytes": {"normalization_rule_name": "identity", "character_coverage": 0.98},
    "default": {},  # nmt_nfkc, extra spaces removed
}


@pytest.mark.parametrize("name", OPTIONS)
def test_ids_of_bpe_models_equal_the_librarys(corpus, samples, name):
    data = trained(corpus, "bpe", **OPTIONS[name])
    backend, _ = sentencepiece_models.convert(data, "x")
    library = sentencepiece.SentencePieceProcessor(model_proto=data)
    for text in samples:
        # Of what the table takes away between a letter and its mark, the two make different things.
        text = text.replace("\x01", "") if name == "default" else text
        ids = library.Encode(text)
        assert backend.encode(text).ids == ids, text
        assert library.unk_id() in ids or backend.decode(ids) == library.Decode(ids)


@pytest.mark.parametrize("name", ["llama", "no bytes", "default"])
def test_ids_of_unigram_models_equal_the_librarys(corpus, samples, name):
    """Where float32 leaves no tie to rounding: there both ways score alike."""
    data = trained(corpus, "unigram", **OPTIONS[name])
    backend, _ = sentencepiece_models.convert(data, "x")
    library = sentencepiece.SentencePieceProcessor(model_proto=data)
    samples = [text.replace("\x01", "") for text in samples]
    different = [text for text in samples if backend.encode(text).ids != library.Encode(text)]
    for text in different:
        scores = [sum(map(library.GetScore, ids)) for ids in (backend.encode(text).ids, library.Encode(text))]
        assert scores[0] == pytest.approx(scores[1], abs=1e-4)
    assert len(different) < 0.02 * len(samples)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_what_is_trained_here(corpus, samples, kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = train_sentencepiece(corpus, 700, kind)
    assert train_sentencepiece(corpus, 700, kind).fingerprint == tokenizer.fingerprint
    assert 300 < tokenizer.vocab_size <= 700
    data = sentencepiece_models.train(
        corpus, 700, kind, True, "<|pad|>", "<|endoftext|>", ("<|im_start|>", "<|im_end|>")
    )
    library = sentencepiece.SentencePieceProcessor(model_proto=data)
    tokenizer.save(tmp_path)
    ours, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == ours.vocab_size
    for text in samples:
        ids = library.Encode(text)
        assert ours.encode(text) == tokenizer.encode(text) == ids, text
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids
        assert theirs(text)["input_ids"] == ours.encode(text, add_special_tokens=True) == [ours.bos_id, *ids]
        assert ours.decode(ids) == text.replace("▁", " ") == theirs.decode(ids)
        assert ours.token_bytes[ids].sum() == len(text.replace("▁", " ").encode())
    assert [library.IdToPiece(i) for i in (ours.pad_id, ours.eos_id)] == ["<|pad|>", "<|endoftext|>"]
    digits = [ours.backend.id_to_token(i) for i in ours.encode("12345")]
    assert len(digits) == 5


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_chats_and_offsets(corpus, kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = with_template(train_sentencepiece(corpus, 600, kind), "chatml")
    tokenizer.save(tmp_path)
    messages = [{"role": "user", "content": " q 日本 "}, {"role": "assistant", "content": "an\nanswer 🙂 é"}]
    ids, mask = render(tokenizer, messages)
    found = transformers.AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(messages, return_dict=True)
    assert found["input_ids"] == ids and tokenizer.decode(ids).startswith("<|im_start|>user\n q 日本 <|im_end|>")
    assert tokenizer.decode([i for i, m in zip(ids, mask) if m]) == "an\nanswer 🙂 é<|im_end|>"
    assert ids[-1] == tokenizer.end_of_turn_id
    (encoding,) = tokenizer.encode_batch([ODD])
    assert [ODD[a:b] for a, b in encoding.offsets][0] == "日" or encoding.offsets[0][1] <= 3
    assert encoding.offsets[-1][1] == len(ODD)


def test_folders_with_a_model_alone(corpus, samples, tmp_path):
    """As Llama 2's: no tokenizer.json, `tokenizer_config.json` with or without `legacy`."""
    transformers = pytest.importorskip("transformers")
    data = trained(corpus, "bpe", **LLAMA)
    library = sentencepiece.SentencePieceProcessor(model_proto=data)
    (tmp_path / "tokenizer.model").write_bytes(data)
    bare = load_tokenizer(tmp_path)
    assert (bare.special("bos_token"), bare.eos_id, bare.pad_id) == ("<s>", 2, 2)
    for text in samples:
        assert bare.encode(text) == library.Encode(text)
        assert bare.encode(text, add_special_tokens=True) == [1, *library.Encode(text)]
    before = tokenizer_manifest(tmp_path)
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True, "bos_token": "<s>"}
    config |= {"eos_token": {"__type": "AddedToken", "content": "</s>"}, "pad_token": "<pad>"}
    added = {"700": {"content": "<pad>", "special": True, "normalized": False}}
    added |= {"0": {"content": "<unk>", "special": True, "normalized": False}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"added_tokens_decoder": added}))
    ours, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer_manifest(tmp_path) != before
    ours.save(tmp_path / "saved")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert ours.pad_id == 700 == again.pad_token_id
    for text in [*samples, "a</s>b", "a</s> b<pad>  c"]:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text, add_special_tokens=True) == ids == again(text)["input_ids"], text


def changed(data: bytes, change) -> bytes:
    model = schema.ModelProto.FromString(data)
    change(model)
    return model.SerializeToString()


def _unused(model):
    model.pieces[-1].type = schema.ModelProto.SentencePiece.UNUSED


def _words(model):
    model.trainer_spec.model_type = schema.TrainerSpec.WORD


def _suffix(model):
    model.trainer_spec.treat_whitespace_as_suffix = True


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (_unused, {}, "it has unused pieces; convert it"),
        (_words, {}, "it is neither BPE nor Unigram"),
        (_suffix, {}, "treat_whitespace_as_suffix is set"),
        (None, {"tokenizer_class": "XLMRobertaTokenizer"}, "the ids of a XLMRobertaTokenizer are not the model's own"),
        (None, {"added_tokens_decoder": {"900": {"content": "<x>"}}}, "'<x>' cannot have the id 900"),
        (None, {"add_prefix_space": False}, "add_prefix_space=false is not read"),
    ],
)
def test_what_is_not_read(corpus, tmp_path, change, config, message):
    data = trained(corpus, "bpe", **LLAMA)
    (tmp_path / "tokenizer.model").write_bytes(data if change is None else changed(data, change))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message) as error:
        load_tokenizer(tmp_path)
    assert "tokenizer.model" in str(error.value) and "\n" not in str(error.value)


def test_broken_models_and_impossible_vocabularies(tmp_path, corpus, monkeypatch):
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(UserError, match="tokenizer.model is no SentencePiece model"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="tokenizer.vocab_size is 200: sentencepiece refuses: .*mall"):
        train_sentencepiece(corpus, 200, "bpe")
    with pytest.raises(UserError, match="no text"):
        train_sentencepiece([], 500, "unigram")
    # A pipeline that is not the library's is never used.
    monkeypatch.setattr(sentencepiece_models, "_normalizers", lambda model, prefix, escape: [])
    with pytest.raises(UserError, match="the ids of .* would differ from sentencepiece's"):
        sentencepiece_models.convert(trained(corpus, "bpe", **LLAMA), "x")
