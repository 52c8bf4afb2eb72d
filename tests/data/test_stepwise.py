"""Pairs one step apart: what is read, what is a target, where an end token stands."""

import dataclasses
import pathlib

import numpy as np
import pytest
import tokenizers

from llm_jax.base.errors import UserError
from llm_jax.data.chat import with_template
from llm_jax.data.config import DataConfig, EmbeddedConfig
from llm_jax.data.encode import encode_examples
from llm_jax.data.examples import Completion
from llm_jax.data.fitting import Counts, fit
from llm_jax.data.formats import read_examples
from llm_jax.data.loader import Loader
from llm_jax.data.prepare import prepare
from llm_jax.data.stepwise import StepPair
from llm_jax.data.tokenizers import load_tokenizer

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "trl"
ASKED = ({"role": "user", "content": "How many?"},)
PUBLISHED = {
    "dataset": "math",
    "prompt": "How many?",
    "initial_reason_steps": "Let's think step by step.\nStep 1: 1 + 1 = 2.\nStep 2:",
    "chosen": " 2 + 1 = 3.",
    "rejected": " 2 + 1 = 4.",
    "full_chosen": " 2 + 1 = 3.\nStep 3: so 3.",
    "answer": "3",
}


def pairs(record) -> list[StepPair]:
    found = read_examples("preference", record, "f:1")
    assert all(isinstance(pair, StepPair) for pair in found)
    return found  # pyright: ignore[reportReturnType]


def encoded(example, tokenizer):
    return next(encode_examples("preference", [("f:1", example)], tokenizer))


def test_forms():
    prefix, chosen, rejected = (PUBLISHED[name] for name in ("initial_reason_steps", "chosen", "rejected"))
    whole = StepPair(ASKED, prefix, chosen, rejected)
    assert pairs(PUBLISHED) == [whole]
    own = {"prompt": list(ASKED), "prefix": prefix, "chosen": chosen, "rejected": rejected}
    assert pairs(own) == [whole]
    assert pairs({**own, "prompt": "How many?"}) == [whole]  # its generator's field, a bare question
    ended = dataclasses.replace(whole, ends=(True, False), numbers={"label_smoothing": 0.25, "weight": 2.0})
    assert pairs({**own, "chosen_ends": True, "label_smoothing": 0.25, "weight": 2}) == [ended]
    led = ({"role": "system", "content": "s"}, *ASKED)
    assert pairs({**own, "system": "s"}) == [dataclasses.replace(whole, prompt=led)]
    assert pairs({**own, "prefix": ["a\n", "b\n"], "chosen": ["c"]})[0].prefix == "a\nb\n"
    assert pairs({**own, "prefix": []})[0].prefix == ""
    continued = {"prompt": "Q: How many?\nA: ", "chosen": "3\n", "rejected": "4\n", "rejected_ends": True}
    assert pairs(continued) == [StepPair("Q: How many?\nA: ", "", "3\n", "4\n", (False, True))]


def test_whole_answers_are_compared_step_by_step():
    record = {"prompt": "How many?", "chosen": ["a\n", "b\n", "c"], "rejected": ["a\n", "d"]}
    assert pairs(record) == [StepPair(ASKED, "a\n", "b\n", "d", (False, True))]
    record["rejected"] = ["a\n", "b\n", "d"]
    assert pairs(record) == [StepPair(ASKED, "a\nb\n", "c", "d", (True, True))]


def test_marked_solutions():
    def solution(text, right):
        return {"solution": text, "is_correct": right}

    record = {
        "question": "How many?",
        "ground_truth": "g\nA: 3",
        "small": solution("a\nb\nA: 3", True),
        "large": solution("a\nc\nA: 3", True),
        "wrong": solution("a\nc\nA: 4", False),
        "again": solution("a\nc\nA: 4", False),
    }
    assert pairs(record) == [
        StepPair(ASKED, "a\n", "b\n", "c\n"),
        StepPair(ASKED, "a\nc\n", "A: 3", "A: 4", (True, True)),
    ]
    assert pairs({"question": "q", "one": solution("a", True)}) == []
    ground = {**record, "small": solution("x", False), "large": solution("g\nx", False)}
    assert [(p.prefix, p.chosen, p.rejected) for p in pairs(ground)] == [
        ("", "g\n", "x"),
        ("g\n", "A: 3", "x"),
        ("", "g\n", "a\n"),
    ]


def test_gsm8k_demonstrations():
    answer = "48/2 = <<48/2=24>>24 in May.\n#### 24"
    found = read_examples("sft", {"question": "How many?", "answer": answer}, "f:1")
    assert found == [Completion(ASKED, ({"role": "assistant", "content": answer},))]


@pytest.mark.parametrize("bos", [False, True])
def test_plain_steps_end_only_where_the_answer_does(bos):
    folder = GOLDEN / ("tokenizer_bos" if bos else "tokenizer")
    tokenizer, outside = load_tokenizer(folder), tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    prompt, chosen, rejected = "Ben has 3 pencils.\n", "He gives away 2.\n", "He finds 2.\n"
    pair = encoded(StepPair(prompt, "", chosen, rejected, (False, True)), tokenizer)
    before = outside.encode(prompt).ids
    ends = (chosen, []), (rejected, [tokenizer.eos_id])
    for sequence, (step, end) in zip(pair.sequences, ends, strict=True):
        assert sequence.ids.tolist() == outside.encode(prompt + step).ids + end
        assert sequence.mask.tolist() == [0] * len(before) + [1] * (len(sequence.ids) - len(before))
    assert (before[0] == tokenizer.bos_id) == bos


def test_chat_steps_end_only_where_the_answer_does(chat_bpe):
    prefix, step = "13 - 2 = 11.", " 11 + 5 = 16."
    pair = encoded(StepPair(ASKED, prefix, step, " Answer: 16", (False, True)), chat_bpe)
    opened = "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"
    texts = [chat_bpe.decode(s.ids.tolist(), skip_special_tokens=False) for s in pair.sequences]
    assert texts == [opened + prefix + step, opened + prefix + " Answer: 16<|im_end|>"]
    targets = [chat_bpe.decode(s.ids[s.mask == 1].tolist(), skip_special_tokens=False) for s in pair.sequences]
    assert targets == [step, " Answer: 16<|im_end|>"]
    assert not pair.merged


def test_a_border_inside_a_token_is_counted(bpe):
    merged = encoded(StepPair("x", "", "yz", "zz"), bpe), encoded(StepPair("= ", "", "13", "14"), bpe)
    for pair in merged:
        one, other = (s.ids[s.mask == 1].tolist() for s in pair.sequences)
        shared = pair.sequences[0].ids[: pair.prompt_length].tolist()
        assert bpe.decode(shared + one).endswith(("yz", "13")) and bpe.decode(shared + other).endswith(("zz", "14"))


BAD = [
    ({"prefix": "", "chosen": [], "rejected": ["a"]}, "`chosen` has no steps"),
    ({"chosen": ["a", ""], "rejected": ["a", "b"]}, "`chosen` has to be a list of strings, none of them empty"),
    ({"chosen": ["a", "b"], "rejected": ["a", "b"]}, "`chosen` and `rejected` have equal steps"),
    ({"chosen": ["a", "b"], "rejected": ["a"]}, "differ in no step"),
    ({"chosen": ["a"], "rejected": ["b"], "chosen_ends": True}, "`chosen_ends` is not read beside whole answers"),
    ({"prefix": 3, "chosen": "a", "rejected": "b"}, "`prefix` has to be a string or a list of steps, not int"),
    ({"prefix": "", "chosen": "a"}, "`rejected` has to be a string"),
    ({"prefix": "", "initial_reason_steps": "", "chosen": "a", "rejected": "b"}, "two names of the same"),
    ({"prefix": "", "chosen": "a", "rejected": "b", "chosen_ends": 1}, "`chosen_ends` is 1"),
    ({"prefix": "", "chosen": "a", "rejected": "b", "label_smoothing": 0.6}, r"`label_smoothing` is 0.6.*\[0, 0.5\]"),
    ({"prompt": "", "prefix": "", "chosen": "a", "rejected": "b"}, "`prompt` is empty"),
    ({"prompt": None, "prefix": "", "chosen": "a", "rejected": "b"}, "needs a `prompt`"),
    (
        {"prompt": [*ASKED, {"role": "assistant", "content": "a"}], "prefix": "", "chosen": "a", "rejected": "b"},
        "ends in a turn of the assistant's: write its steps into `prefix`",
    ),
    ({"prompt": "q", "chosen": "a", "rejected": "b", "chosen_ends": False, "system": "s"}, "stand beside strings"),
    ({"one": {"solution": "a", "is_correct": True}}, "no `question`"),
    ({"question": "q", "one": {"solution": " ", "is_correct": True}}, "`one.solution` has no steps"),
    ({"question": "q", "one": {"solution": "a", "is_correct": "yes"}}, "one: `is_correct` is 'yes'"),
]


@pytest.mark.parametrize(("fields", "message"), BAD)
def test_bad_records(fields, message):
    with pytest.raises(UserError, match=f"^f:1.*{message}"):
        pairs({"prompt": "q", **fields})


@pytest.mark.parametrize("kind", ["unpaired", "compared", "labelled", "ranking"])
def test_other_kinds_of_record_refuse_steps(kind):
    with pytest.raises(UserError, match=f"^f:1: pairs of steps are no records of {kind}"):
        read_examples(kind, PUBLISHED, "f:1")


def test_a_wrong_prefix_is_named(chat_bpe, tmp_path):
    with pytest.raises(UserError, match="^f:1: wrong prefix: it contains the end token"):
        encoded(StepPair(ASKED, f"a{chat_bpe.special('eos_token')}", "b", "c"), chat_bpe)
    stripping = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] | trim }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    (tmp_path / "stripping.jinja").write_text(stripping)
    tokenizer = with_template(chat_bpe, str(tmp_path / "stripping.jinja"))
    with pytest.raises(UserError, match="^f:1: wrong prefix: the chat template writes .* before `chosen` differently"):
        encoded(StepPair(ASKED, " a", "b", "c", (True, True)), tokenizer)


def test_equal_and_empty_steps_are_counted_or_named(chat_bpe):
    examples = [StepPair(ASKED, "a", " b", " b"), StepPair(ASKED, "a", " ", " b"), StepPair(ASKED, "a", " b", "")]
    located = [(f"f:{i}", example) for i, example in enumerate(examples, 1)]
    counts = Counts()
    assert list(fit(encode_examples("preference", located, chat_bpe), 256, "error", counts)) == []
    assert (counts.documents, counts.identical, counts.blank) == (3, 1, 2)
    for where, message in zip(located, ("f:1: `chosen` and `rejected` are equal", "f:2: `chosen` is empty", "f:3")):
        with pytest.raises(UserError, match=message):
            list(fit(encode_examples("preference", [where], chat_bpe), 256, "error", Counts(), "error"))


def test_rows(chat_bpe, tmp_path):
    """Embedded steps as rows: of each pair the prompt and the steps before are context, and what follows a target."""
    data = DataConfig(embedded="steps", window=512, generated=EmbeddedConfig(records=40, eval_records=8))
    rows = prepare("preference", data, chat_bpe, tmp_path).train
    found = 0
    for batch in (Loader(rows, 1, shuffle=False).batch(i) for i in range(len(rows))):
        row = {name: value[0, 0] for name, value in batch.items()}
        assert np.isnan(row["label_smoothing"][row["pair_index"] >= 0]).all()
        for number in range(1, int(row["segment_ids"].max()) + 1):
            places = row["segment_ids"] == number
            ids, mask = row["tokens"][places], row["loss_mask"][places]
            said = chat_bpe.decode(ids[mask == 1].tolist(), skip_special_tokens=False)
            context = chat_bpe.decode(ids[mask == 0].tolist(), skip_special_tokens=False)
            assert ("Answer" in said) == said.endswith("<|im_end|>")
            assert "Answer" in said or "=" in said
            assert "Answer" not in context and "<|im_start|>assistant\n" in context
            found += 1
    assert found == 80
