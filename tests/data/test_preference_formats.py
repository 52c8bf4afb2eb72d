"""Unpaired answers, UltraFeedback's files, numbers of a record's own, and what becomes of them in rows."""

import numpy as np
import pytest

from llm_jax.base.errors import UserError
from llm_jax.data.config import DataConfig
from llm_jax.data.encode import Sequence
from llm_jax.data.examples import Pair, Unpaired
from llm_jax.data.fitting import Item
from llm_jax.data.formats import read_examples
from llm_jax.data.mismatching import mismatched
from llm_jax.data.prepare import prepare

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
OTHER = {"role": "assistant", "content": "b"}
HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}


def unpaired(record, **options):
    return read_examples("unpaired", record, "f:1", **options)


def test_unpaired_formats():
    """TRL's unpaired preference type, strings and messages, and LLaMA-Factory's `kto_tag` on each of its formats."""
    assert unpaired({"prompt": "q", "completion": "a", "label": True}) == [Unpaired("q", "a", True)]
    bad = Unpaired((USER,), (ASSISTANT,), False)
    assert unpaired({"prompt": [USER], "completion": [ASSISTANT], "label": 0}) == [bad]
    assert unpaired({"messages": [USER, ASSISTANT], "kto_tag": False}) == [bad]
    assert unpaired({"messages": [USER, ASSISTANT], "label": False, "chosen": None}) == [bad]
    assert unpaired({"conversations": [HUMAN, GPT], "kto_tag": False, "system": ""}) == [bad]
    assert unpaired({"instruction": "q", "input": "", "output": "a", "kto_tag": False}) == [bad]
    talk = [USER, OTHER, USER, ASSISTANT]
    good = Unpaired((USER, OTHER, USER), (ASSISTANT,), True, numbers={"weight": 2.0})
    assert unpaired({"messages": talk, "kto_tag": True, "weight": 2}) == [good]


def test_pairs_taken_apart():
    pair = {"prompt": "q", "chosen": "a", "rejected": "b", "weight": 0.5, "margin": 1}
    half = {"weight": 0.5}
    assert unpaired(pair, unpair=True) == [
        Unpaired("q", "a", True, numbers=half),
        Unpaired("q", "b", False, numbers=half),
    ]
    assert unpaired({"prompt": "q", "completion": "a", "label": 1}, unpair=True) == [Unpaired("q", "a", True)]


def test_ultrafeedback_formats():
    def read(record):
        return read_examples("preference", record, "f:1")

    numbers = {"chosen_score": 8.5, "rejected_score": 3.0}
    pair = Pair((USER,), (ASSISTANT,), (OTHER,), numbers=numbers)
    transcripts = {"chosen": [USER, ASSISTANT], "rejected": [USER, OTHER]}
    scores = {"score_chosen": 8.5, "score_rejected": 3}
    # HuggingFaceH4/ultrafeedback_binarized, trl-lib/ultrafeedback_binarized, argilla's ratings, openbmb/UltraFeedback.
    assert read({"prompt": "q", "prompt_id": "1", "messages": [USER, ASSISTANT], **transcripts, **scores}) == [pair]
    assert read({**transcripts, **scores}) == [pair]
    assert read({"prompt": "q", **transcripts, "chosen-rating": 8.5, "rejected-rating": 3.0}) == [pair]
    answers = [("b", 3.0), ("c", 5), ("a", 8.5)]
    completions = [{"response": text, "overall_score": score, "model": "m"} for text, score in answers]
    assert read({"instruction": "q", "completions": completions, "source": "s"}) == [pair]
    # A system message that the prompt does not say again belongs to it.
    system = {"role": "system", "content": "s"}
    led = {side: [system, *turns] for side, turns in transcripts.items()}
    assert read({"prompt": "q", **led, **scores}) == [Pair((system, USER), (ASSISTANT,), (OTHER,), numbers=numbers)]
    # Where all score the same there is nothing to prefer: an equal pair, which is counted and left out.
    (tied,) = read({"instruction": "q", "completions": [dict(c, overall_score=1) for c in completions]})
    assert isinstance(tied, Pair) and tied.chosen == tied.rejected


@pytest.mark.parametrize(
    ("kind", "record", "message"),
    [
        ("unpaired", {"prompt": "q", "completion": "a", "label": 2}, "`label` is 2; an answer is desirable"),
        ("unpaired", {"messages": [USER], "kto_tag": True}, "no message of the assistant"),
        ("unpaired", {"messages": [USER, ASSISTANT, USER], "kto_tag": True}, "has to end with the answer"),
        ("unpaired", {"text": "t", "kto_tag": True}, "`kto_tag` stands beside no prompt and answer"),
        ("preference", {"prompt": "q", "chosen": "a", "rejected": "b", "margin": "1"}, "`margin` is '1'"),
        ("preference", {"prompt": "q", "chosen": [USER], "rejected": [USER]}, "`chosen` is no more than the prompt"),
        ("preference", {"instruction": "q", "completions": [{}]}, "`completions` has to be a list of two or more"),
        ("preference", {"instruction": "q", "completions": [{}, {}]}, r"`completions\[0\]` needs a text `response`"),
    ],
)
def test_bad_records(kind, record, message):
    with pytest.raises(UserError, match=message):
        read_examples(kind, record, "f:1")


def test_numbers_become_columns(bpe, tmp_path, write_jsonl):
    pairs = [{"prompt": "q", "chosen": f"{i}", "rejected": "b", "margin": i} for i in range(6)]
    path = write_jsonl(*pairs, {"prompt": "r", "chosen": "c", "rejected": "d", "weight": 3, "chosen_score": 1})
    data = DataConfig(path=path, eval_path=path, window=64)
    rows = prepare("preference", data, bpe, tmp_path / "data").train.columns()
    present = rows["pair_index"] >= 0
    assert sorted(rows["weight"][present].tolist()) == [1.0] * 6 + [3.0] and not rows["weight"][~present].any()
    assert sorted(rows["margin"][present & ~np.isnan(rows["margin"])].tolist()) == [0, 1, 2, 3, 4, 5]
    assert np.isnan(rows["rejected_score"][present]).all() and np.nansum(rows["chosen_score"][present]) == 1


def sequence(prompt, answer):
    mask = [0] * len(prompt) + [1] * len(answer)
    return Item((Sequence(np.array([*prompt, *answer], np.int32), np.array(mask, np.uint8)),))


def joined(items, window=9):
    return [item.sequences[1].ids.tolist() for item in mismatched(items, window)]


def test_answers_are_rotated_by_one():
    """As TRL's KTO: [last, first, second, ...]; of the same prompt in a row the one before them is taken."""
    assert joined([sequence([1], [7]), sequence([2], [8, 8]), sequence([3], [9])]) == [[1, 9], [2, 7], [3, 8, 8]]
    siblings = [sequence([1], [7]), sequence([1], [8]), sequence([2], [9]), sequence([2], [6])]
    assert joined(siblings) == [[1, 6], [1, 6], [2, 8], [2, 8]]
    around = [sequence([1], [7]), sequence([2], [8]), sequence([1], [9])]
    assert joined(around) == [[1, 8], [2, 7], [1, 8]]
    assert joined([sequence([1], [7])]) == [[1, 7]]  # there is no other
    assert joined([sequence([1] * 8, [7]), sequence([2], [8] * 8)]) == [[1] * 8 + [8], [2, 7]]  # cut to the window


def test_unpaired_rows_hold_each_answer_with_a_mismatched_one(bpe, tmp_path, write_jsonl):
    records = [{"prompt": f"q{i}", "completion": "a" * (i % 3 + 1), "label": i % 2 == 0} for i in range(12)]
    path = write_jsonl(*records, {"prompt": "q", "completion": " ", "label": True})
    data = DataConfig(path=path, eval_path=path, window=48)
    prepared = prepare("unpaired_mismatched", data, bpe, tmp_path / "data")
    assert prepared.summary["train"]["blank"] == 1 and prepared.summary["train"]["documents"] == 13
    seen = {}
    for row in (prepared.train[i] for i in range(len(prepared.train))):
        for place, number in enumerate(row["answer_index"].tolist()):
            if number < 0:
                continue
            for prefix in ("", "kl_"):
                here = row[f"{prefix}segment_ids"] == place + 1
                ids, mask = row[f"{prefix}tokens"][here], row[f"{prefix}loss_mask"][here] == 1
                seen[number, prefix] = bpe.decode(ids[~mask].tolist()), bpe.decode(ids[mask].tolist())
            assert row["label"][place] == (number % 2 == 0) and row["weight"][place] == 1
    assert len(seen) == 24
    for i in range(12):
        own = "a" * (i % 3 + 1) + "<|endoftext|>"
        assert seen[i, ""] == (f"<|endoftext|>q{i}", own)
        assert seen[i, "kl_"] == (seen[i, ""][0], seen[(i - 1) % 12, ""][1])


def test_a_beginning_and_an_end_each_once(bpe, tmp_path, write_jsonl):
    """What the tokenizer's post-processor writes comes once, before the prompt and never before the answer, and the end
    is not written twice where the text has it; the mismatched answers have both too."""
    records = [{"prompt": f"q{i}", "completion": f"{i}<|endoftext|>", "label": True} for i in range(4)]
    path = write_jsonl(*records)
    data = DataConfig(path=path, eval_path=path, window=48)
    rows = prepare("unpaired_mismatched", data, bpe, tmp_path / "data").train.columns()
    for prefix in ("", "kl_"):
        for ids, segments in zip(rows[f"{prefix}tokens"], rows[f"{prefix}segment_ids"], strict=True):
            for number in range(1, segments.max() + 1):
                own = ids[segments == number]
                assert own[0] == bpe.bos_id and own[-1] == bpe.eos_id and (own == bpe.eos_id).sum() == 2
