"""Conversations with tools, and turns that are not learned, against what transformers makes with templates of TRL."""

import json
import pathlib

import pytest

from llm_jax.base.errors import UserError
from llm_jax.data.chat import render, render_text, with_template
from llm_jax.data.encode import encode_examples
from llm_jax.data.examples import Conversation
from llm_jax.data.formats import read_examples
from llm_jax.data.templating import assistant_spans, load_template, render_marked
from llm_jax.data.tokenizers import load_tokenizer

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "chat_tools.json").read_text())
NAMES = list(GOLDEN["templates"])


def conversations() -> list[Conversation]:
    made = [read_examples("sft", record, "f:1")[0] for record in GOLDEN["conversations"]]
    return [example for example in made if isinstance(example, Conversation)]


@pytest.mark.parametrize("name", NAMES)
def test_texts_and_spans_equal_transformers(name):
    template = GOLDEN["templates"][name]
    for example, expected in zip(conversations(), GOLDEN["rendered"][name], strict=True):
        if expected is None:
            with pytest.raises(UserError, match="single tool-calls"):
                render_marked(template, example.messages, {}, tools=example.tools)
            continue
        text, spans = render_marked(template, example.messages, {}, tools=example.tools)
        assert text == expected["text"]
        assert spans == [tuple(span) for span in expected["spans"]]
        if expected["spans"]:
            assert assistant_spans(template, example.messages, {}, tools=example.tools) == (text, spans)


@pytest.mark.parametrize("name", [*NAMES[:2], "chatml_tools"])
def test_ids_and_masks_equal_transformers(bpe, tmp_path, name):
    transformers = pytest.importorskip("transformers")
    template = load_template(name) if name == "chatml_tools" else GOLDEN["templates"][name]
    tokenizer = bpe.with_chat_template(template)
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for record, example in zip(GOLDEN["conversations"], conversations(), strict=True):
        found = theirs.apply_chat_template(
            record["messages"], tools=record["tools"], return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = render(load_tokenizer(tmp_path), example.messages, tools=example.tools)
        assert (found["input_ids"], found["assistant_masks"]) == (ids, mask)
        (encoded,) = encode_examples("sft", [("f:1", example)], tokenizer)
        assert encoded.sequences[0].ids.tolist() == ids and encoded.sequences[0].mask.tolist() == mask


def test_chatml_tools_says_what_qwen_says(bpe):
    """As Qwen 2.5 where there is a system message, without its line ends after the last turn and within calls."""
    ours = load_template("chatml_tools")
    for example, expected in zip(conversations(), GOLDEN["rendered"]["qwen2_5_training"], strict=True):
        if example.messages[0]["role"] == "system":
            text, _ = render_marked(ours, example.messages, {}, tools=example.tools)
            theirs = expected["text"].replace("assistant\n\n<tool_call>", "assistant\n<tool_call>").rstrip("\n")
            theirs = theirs.replace("<|im_start|>user\n\n<tool_response>", "<|im_start|>user\n<tool_response>")
            assert text == theirs.replace("</tool_response>\n\n<tool_response>", "</tool_response>\n<tool_response>")
    plain = [{k: m[k] for k in ("role", "content")} for m in GOLDEN["conversations"][3]["messages"]]
    assert render_marked(ours, plain, {}) == render_marked(load_template("chatml"), plain, {})


TURNS = [
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "first"},
    {"role": "user", "content": "r"},
    {"role": "assistant", "content": "second"},
]


@pytest.mark.parametrize("name", ["chatml", "chatml_tools", "plain", "qwen2_5_training", "prefixes"])
def test_only_learned_turns_are_in_the_mask(bpe, name):
    prefixes = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    prompt = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    known = {**GOLDEN["templates"], "prefixes": prefixes + prompt}
    tokenizer = bpe.with_chat_template(known[name]) if name in known else with_template(bpe, name)
    ids, mask = render(tokenizer, TURNS)
    for learned in ((True, False), (False, True)):
        same, chosen = render(tokenizer, TURNS, learned=learned)
        assert same == ids
        kept = "".join(tokenizer.decode([i]) for i, m in zip(ids, chosen) if m)
        assert ("first" in kept, "second" in kept) == learned
    halves = [render(tokenizer, TURNS, learned=learned)[1] for learned in ((True, False), (False, True))]
    assert [a + b for a, b in zip(*halves)] == mask
    with pytest.raises(UserError, match="all-zero"):
        render(tokenizer, TURNS, learned=(False, False))


def test_marks_that_do_not_tell_turns_apart(bpe):
    template = "{% generation %}{% for m in messages %}{{ m.content }}{% endfor %}{% endgeneration %}"
    with pytest.raises(UserError, match="marks 1 stretches of 2 turns"):
        render(bpe.with_chat_template(template), TURNS, learned=(True, False))


TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "f"}}]}
TOLD = {"role": "tool", "content": "3"}
NO_RESULTS = "{{ tools | tojson }}{% for m in messages if m.role != 'tool' %}{{ m | tojson }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "record", "message"),
    [
        ("chatml", {"messages": TURNS, "tools": [TOOL]}, "leaves out `tools`; chatml_tools shows them"),
        ("chatml", {"messages": [TURNS[0], CALLING]}, "leaves out the `tool_calls` of a turn of role assistant"),
        (NO_RESULTS, {"messages": [TURNS[0], CALLING, TOLD, TURNS[3]]}, "leaves out the text of a turn of role tool"),
        ("chatml", {"prompt": TURNS[:1], "completion": TURNS[1:2], "tools": [TOOL]}, "leaves out `tools`"),
    ],
)
def test_a_template_that_loses_tools_is_refused(bpe, template, record, message):
    tokenizer = with_template(bpe, "chatml") if template == "chatml" else bpe.with_chat_template(template)
    with pytest.raises(UserError, match=f"f:1: chat template: it {message}") as error:
        list(encode_examples("sft", [("f:1", read_examples("sft", record, "f:1")[0])], tokenizer))
    assert "\n" not in str(error.value)


def test_pairs_with_tools_are_rendered_with_them(bpe):
    tokenizer = with_template(bpe, "chatml_tools")
    other = {"role": "assistant", "content": "other"}
    record = {"prompt": TURNS[:1], "chosen": TURNS[1:2], "rejected": [other], "tools": [TOOL]}
    (encoded,) = encode_examples("preference", [("f:1", read_examples("preference", record, "f:1")[0])], tokenizer)
    for sequence, answer in zip(encoded.sequences, (TURNS[1], other), strict=True):
        text = render_text(tokenizer, [TURNS[0], answer], tools=[TOOL])
        assert sequence.ids.tolist() == tokenizer.encode(text) and '"name": "f"' in text
        assert tokenizer.decode(sequence.ids[sequence.mask == 1].tolist()) == answer["content"] + "<|im_end|>"
