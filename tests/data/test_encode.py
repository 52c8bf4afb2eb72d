"""Ids and masks equal TRL's (`tests/oracles/trl_sft.py`, `trl_dpo.py`), and the cases TRL does not have."""

import functools
import json
import pathlib

import pytest

from llm_jax.base.errors import UserError
from llm_jax.data import encode
from llm_jax.data.encode import encode_examples
from llm_jax.data.examples import Completion, Pair, Text
from llm_jax.data.formats import read_examples
from llm_jax.data.tokenizers import load_tokenizer

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "trl"


@functools.cache
def trl_tokenizer(bos=False):
    """The oracles' tokenizers; one puts a bos before plain strings."""
    return load_tokenizer(GOLDEN / ("tokenizer_bos" if bos else "tokenizer"))


def golden(name):
    cases = json.loads((GOLDEN / name).read_text())
    return [
        pytest.param(case, kind.endswith("_bos"), id=f"{kind}-{i}")
        for kind, found in cases.items()
        for i, case in enumerate(found)
    ]


def one(kind, record, tokenizer):
    (example,) = read_examples(kind, record, "here:1")
    (encoded,) = encode_examples(kind, [("here:1", example)], tokenizer)
    return encoded


@pytest.mark.parametrize(("case", "bos"), golden("sft_tokens.json"))
def test_sft_equals_trl(case, bos):
    (sequence,) = one("sft", case["record"], trl_tokenizer(bos)).sequences
    assert sequence.ids.tolist() == case["input_ids"]
    assert sequence.mask.tolist() == case["mask"]


@pytest.mark.parametrize(("case", "bos"), golden("dpo_tokens.json"))
def test_preference_equals_trl(case, bos):
    encoded = one("preference", case["record"], trl_tokenizer(bos))
    for sequence, answer in zip(encoded.sequences, ("chosen_ids", "rejected_ids"), strict=True):
        assert sequence.ids.tolist() == case["prompt_ids"] + case[answer]
        assert sequence.mask.tolist() == [0] * len(case["prompt_ids"]) + [1] * len(case[answer])


def test_documents(bpe):
    whole, begun, middle = encode_examples(
        "pretrain",
        [("a", Text("one two")), ("b", Text("one two", ends=False)), ("c", Text("one two", False, False))],
        bpe,
    )
    ids = bpe.encode("one two")
    assert [e.sequences[0].ids.tolist() for e in (whole, begun, middle)] == [[1, *ids, 1], [1, *ids], ids]


def test_plain_strings_begin_and_end_as_the_tokenizer_says(bpe):
    encoded = one("sft", {"prompt": "2 + 2 =", "completion": " 4"}, bpe)
    (sequence,) = encoded.sequences
    assert bpe.decode(sequence.ids) == "<|endoftext|>2 + 2 = 4<|endoftext|>"
    assert bpe.decode(sequence.ids[sequence.mask == 1]) == " 4<|endoftext|>"
    assert one("sft", {"prompt": "a", "completion": "b<|endoftext|>"}, bpe).sequences[0].ids.tolist().count(1) == 2


def test_batches_do_not_change_anything(chat_bpe, monkeypatch):
    messages = ({"role": "user", "content": "q"},)
    answers = [({"role": "assistant", "content": str(i)},) for i in range(5)]
    examples = [("w", Completion(messages, a)) for a in answers] + [("w", Completion("p", str(i))) for i in range(4)]
    whole = list(encode_examples("sft", examples, chat_bpe))
    monkeypatch.setattr(encode, "BATCH_EXAMPLES", 2)
    for a, b in zip(whole, encode_examples("sft", examples, chat_bpe), strict=True):
        assert a.sequences[0].ids.tolist() == b.sequences[0].ids.tolist()


def test_merged_boundaries_are_told():
    assert one("sft", {"prompt": "The hat is on th", "completion": "e cat"}, trl_tokenizer()).merged
    assert not one("sft", {"prompt": "The hat", "completion": " on"}, trl_tokenizer()).merged


def test_a_template_that_leaves_out_the_answer_is_refused(bpe):
    tokenizer = bpe.with_chat_template("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}")
    user, assistant = ({"role": "user", "content": "q"},), ({"role": "assistant", "content": "a"},)
    with pytest.raises(UserError, match="data.jsonl:7.*loss mask"):
        list(encode_examples("sft", [("data.jsonl:7", Completion(user, assistant))], tokenizer))
    with pytest.raises(UserError, match="data.jsonl:7.*loss mask"):
        list(encode_examples("preference", [("data.jsonl:7", Pair(user, assistant, assistant))], tokenizer))
