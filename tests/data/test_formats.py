import json

import pytest

from llm_jax.base.errors import UserError
from llm_jax.data.examples import Completion, Conversation, Pair, Text
from llm_jax.data.formats import read_examples

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def sft(record):
    return read_examples("sft", record, "f:1")


def test_sft_formats():
    turn = Completion((USER,), (ASSISTANT,))
    assert sft({"prompt": "q", "completion": "a"}) == [Completion("q", "a")]
    assert sft({"prompt": [USER], "completion": [ASSISTANT]}) == [turn]
    assert sft({"messages": [USER, ASSISTANT]}) == [Conversation((USER, ASSISTANT))]
    assert sft({"instruction": "q", "input": "", "output": "a"}) == [turn]
    assert sft({"instruction": "q", "output": "a"}) == [turn]
    with_input = Completion(({"role": "user", "content": "q\n\nmore"},), (ASSISTANT,))
    assert sft({"instruction": "q", "input": "more", "output": "a"}) == [with_input]
    instances = [{"input": "", "output": "a"}, {"input": "more", "output": "a"}]
    assert sft({"instruction": "q", "instances": instances}) == [turn, with_input]
    shared = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    assert sft(shared) == [Conversation((USER, ASSISTANT))]
    assert sft({"text": "all"}) == [Text("all")]


def test_system_texts_and_histories_are_kept():
    system, turns = {"role": "system", "content": "s"}, [USER, ASSISTANT]
    led = [Conversation((system, USER, ASSISTANT))]
    assert sft({"messages": turns, "system": "s"}) == led
    shared = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "weight": 1}]
    assert sft({"conversations": shared, "system": "s", "tools": "[]"}) == led
    assert sft({"conversations": [{"from": "system", "value": "s"}, *shared], "system": ""}) == led
    alpaca = {"instruction": "q", "output": "a"}
    assert sft({**alpaca, "system": "s"}) == [Completion((system, USER), (ASSISTANT,))]
    assert sft({**alpaca, "system": None, "history": []}) == [Completion((USER,), (ASSISTANT,))]
    earlier = ({"role": "user", "content": "h"}, {"role": "assistant", "content": "i"})
    history = {**alpaca, "system": "s", "history": [["h", "i"]]}
    assert sft(history) == [Conversation((system, *earlier, USER, ASSISTANT))]
    seed = {"instruction": "q", "instances": [{"input": "", "output": "a"}], "system": "s"}
    assert sft(seed) == [Completion((system, USER), (ASSISTANT,))]
    completion = {"prompt": [USER], "completion": [ASSISTANT], "system": "s"}
    assert sft(completion) == [Completion((system, USER), (ASSISTANT,))]
    pair = {"chosen": turns, "rejected": turns, "system": "s", "instruction": "q"}
    assert read_examples("preference", pair, "f:1") == [Pair((system, USER), (ASSISTANT,), (ASSISTANT,))]


CALL = {"name": "f", "arguments": {"a": 1}}
TOOL = {"name": "f", "parameters": {"type": "object"}}
WRAPPED = {"type": "function", "function": TOOL}


def test_tools_and_calls():
    calling = {"role": "assistant", "tool_calls": [{"type": "function", "function": CALL}]}
    told = {"role": "tool", "content": "3"}
    turns = (USER, calling, told, ASSISTANT)
    assert sft({"messages": list(turns), "tools": [TOOL]}) == [Conversation(turns, (TOOL,))]
    # As `datasets` gives them back: with nulls where another record has fields.
    padded = [{**USER, "tool_calls": None}, {**calling, "content": None}, {**told, "name": None}, ASSISTANT]
    assert sft({"messages": padded, "tools": json.dumps([WRAPPED])}) == [Conversation(turns, (WRAPPED,))]
    shared = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "a"},
    ]
    assert sft({"conversations": shared, "tools": json.dumps([TOOL])}) == [Conversation(turns, (WRAPPED,))]
    as_text = {"name": "f", "arguments": '{"a": 1}'}
    shared[1]["value"] = json.dumps([as_text, CALL])
    (both,) = sft({"conversations": shared, "tools": "[]"})
    assert isinstance(both, Conversation) and both.messages[1]["tool_calls"] == [*calling["tool_calls"]] * 2
    alpaca = {"instruction": "q", "output": "a", "tools": [TOOL]}
    assert sft(alpaca) == [Completion((USER,), (ASSISTANT,), (WRAPPED,))]


def test_turns_that_are_not_learned():
    quiet, loud = {**ASSISTANT, "weight": 0}, {**ASSISTANT, "train": True}
    turns = (USER, ASSISTANT, USER, ASSISTANT)
    assert sft({"messages": [USER, quiet, USER, loud]}) == [Conversation(turns, learned=(False, True))]
    assert sft({"messages": [{**USER, "weight": 0}, loud, USER, ASSISTANT]}) == [Conversation(turns)]
    human, gpt = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}
    shared = [human, {**gpt, "weight": 1}, {**human, "weight": 0}, {**gpt, "train": False, "weight": 0}]
    assert sft({"conversations": shared}) == [Conversation(turns, learned=(True, False))]
    assert sft({"prompt": [USER, quiet, USER], "completion": [loud]}) == [Completion(turns[:3], (ASSISTANT,))]


def test_preference_formats_of_llama_factory():
    def read(record):
        return read_examples("preference", record, "f:1")

    system, other = {"role": "system", "content": "s"}, {"role": "assistant", "content": "b"}
    human, good, bad = ({"from": who, "value": said} for who, said in (("human", "q"), ("gpt", "a"), ("gpt", "b")))
    pair = Pair((system, USER), (ASSISTANT,), (other,), (WRAPPED,))
    shared = {"conversations": [human], "chosen": good, "rejected": bad, "kto_tag": None}
    assert read({**shared, "system": "s", "tools": json.dumps([TOOL])}) == [pair]
    assert read({**shared, "conversations": [{"from": "system", "value": "s"}, human], "tools": [WRAPPED]}) == [pair]
    openai = {"messages": [USER], "chosen": ASSISTANT, "rejected": other}
    assert read(openai) == [Pair((USER,), (ASSISTANT,), (other,))]
    alpaca = {"instruction": "q", "input": "", "chosen": "a", "rejected": "b", "history": [["h", "i"]]}
    earlier = ({"role": "user", "content": "h"}, {"role": "assistant", "content": "i"})
    assert read({**alpaca, "system": "s"}) == [Pair((system, *earlier, USER), (ASSISTANT,), (other,))]


def test_content_in_parts():
    parts = {"role": "user", "content": [{"type": "text", "text": "q"}]}
    assert sft({"messages": [parts, ASSISTANT]}) == [Conversation((USER, ASSISTANT))]


def test_preference_formats():
    def read(record):
        return read_examples("preference", record, "f:1")

    other = {"role": "assistant", "content": "b"}
    assert read({"prompt": "q", "chosen": "a", "rejected": "b"}) == [Pair("q", "a", "b")]
    pair = Pair((USER,), (ASSISTANT,), (other,))
    assert read({"prompt": [USER], "chosen": [ASSISTANT], "rejected": [other]}) == [pair]
    assert read({"chosen": [USER, ASSISTANT], "rejected": [USER, other]}) == [pair]
    assert read({"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}) == [pair]
    # As TRL: the space before the answers is theirs.
    assert read({"chosen": "1 + 1 is 2", "rejected": "1 + 1 is 3"}) == [Pair("1 + 1 is", " 2", " 3")]
    # Equal answers keep their last message.
    same = [USER, ASSISTANT]
    assert read({"chosen": same, "rejected": same}) == [Pair((USER,), (ASSISTANT,), (ASSISTANT,))]


def test_pretraining_format():
    assert read_examples("pretrain", {"text": "t", "meta": 1}, "f:1") == [Text("t")]
    piece = Text("t", ends=False)
    assert read_examples("pretrain", piece, "f:1") == [piece]


@pytest.mark.parametrize(
    ("kind", "record", "message"),
    [
        ("sft", {"question": "q", "answer": "a"}, r"f:3: sft needs .*; the record has `question`, `answer`"),
        ("sft", {}, "no field"),
        ("sft", [1], "has to be a JSON object, not list"),
        ("sft", Text("t"), "plain text cannot be used for sft"),
        ("sft", {"prompt": "q"}, "the record has `prompt`"),
        ("sft", {"prompt": "q", "completion": [ASSISTANT]}, "both strings or both lists"),
        ("sft", {"prompt": "", "completion": "a"}, "`prompt` is empty"),
        ("sft", {"prompt": 3, "completion": "a"}, "`prompt` has to be a list of messages"),
        ("sft", {"prompt": "q", "completion": "a", "label": True}, "unpaired records"),
        ("sft", {"messages": [USER]}, "no message of the assistant"),
        ("sft", {"messages": []}, "not empty"),
        ("sft", {"messages": [{"role": "user"}]}, r"`messages\[0\]` has no `content`"),
        ("sft", {"messages": [{"content": "x"}]}, "`role` and `content`"),
        ("sft", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "parts that are not text"),
        ("sft", {"conversations": [{"from": "bot", "value": "a"}]}, "from 'bot'"),
        ("sft", {"conversations": [{"from": "human"}]}, "`from` and `value`"),
        ("sft", {"conversations": [{"from": "human", "value": "a"}]}, "no turn of gpt"),
        ("sft", {"instruction": "q", "instances": [{"input": "x"}]}, "f:3, instance 1: `output` has to be a string"),
        ("sft", {"instruction": "q", "instances": []}, "not empty"),
        ("sft", {"instruction": "q", "output": ""}, "`output` is empty"),
        ("preference", {"prompt": "q", "chosen": "a"}, "no `rejected`"),
        ("preference", {"chosen": [USER, ASSISTANT], "rejected": "b"}, "both strings or both lists"),
        ("preference", {"chosen": "abc", "rejected": "xyz"}, "share no beginning"),
        ("preference", {"prompt": "q", "completion": "a", "label": True}, "unpaired"),
        ("preference", {"text": "x"}, "needs `chosen`"),
        ("sft", {"messages": [USER, ASSISTANT], "tools": "[{"}, "`tools` is a text that is not JSON"),
        ("sft", {"messages": [USER, ASSISTANT], "tools": {"name": "f"}}, "`tools` has to be a list of objects"),
        ("sft", {"prompt": "q", "completion": "a", "tools": [{"name": "f"}]}, "`tools` stands beside strings"),
        ("sft", {"text": "t", "tools": [{"name": "f"}]}, "`tools` stands beside plain text"),
        ("sft", {"messages": [USER, ASSISTANT], "images": ["a.png"]}, "`images` is not supported"),
        ("sft", {"messages": [USER, ASSISTANT], "kto_tag": False}, "`kto_tag`"),
        ("sft", {"messages": [USER, {**ASSISTANT, "tool_calls": [1]}]}, r"`messages\[1\].tool_calls` has to be a list"),
        ("sft", {"messages": [{**USER, "tool_calls": [{}]}, ASSISTANT]}, r"`messages\[0\].tool_calls` has to be"),
        ("sft", {"messages": [USER, {"role": "function", "content": "3"}]}, r"`messages\[1\].role` is 'function'"),
        ("sft", {"messages": [USER, {**ASSISTANT, "reasoning_content": "r"}]}, r"reasoning_content` is not supported"),
        ("sft", {"messages": [USER, {**ASSISTANT, "weight": 0}]}, "has no turn that is learned"),
        ("sft", {"messages": [USER, {**ASSISTANT, "weight": 0.5}]}, r"`messages\[1\].weight` is 0.5"),
        ("sft", {"messages": [USER, {**ASSISTANT, "train": "no"}]}, r"`messages\[1\].train` is 'no'"),
        ("sft", {"messages": [{**USER, "train": True}, ASSISTANT]}, "only the assistant's turns are learned"),
        ("sft", {"messages": [USER, {**ASSISTANT, "train": True, "weight": 0}]}, "contradict each other"),
        ("sft", {"prompt": [USER], "completion": [{**ASSISTANT, "weight": 0}]}, r"`completion\[0\]` says otherwise"),
        ("sft", {"prompt": [{**ASSISTANT, "train": 1}], "completion": [ASSISTANT]}, r"`prompt\[0\]` says otherwise"),
        ("sft", {"conversations": [{"from": "gpt", "value": "a", "train": False}]}, "has no turn that is learned"),
        ("sft", {"conversations": [{"from": "function_call", "value": "{}"}]}, "has to hold `name` and `arguments`"),
        ("sft", {"conversations": [{"from": "function_call", "value": "f(1)"}]}, "its `value` is not JSON"),
        ("sft", {"conversations": [{"from": "function_call", "value": "[]"}]}, "calls nothing"),
        ("sft", {"conversations": [{"from": "human", "value": "q"}], "kto_tag": True}, "unpaired records .*`kto_tag`"),
        ("preference", {"conversations": [], "kto_tag": True}, "unpaired records .*`kto_tag`.* by preference"),
        ("preference", {"chosen": {"from": "gpt", "value": "a"}, "rejected": {}}, "no `conversations` before"),
        (
            "preference",
            {"messages": [USER], "chosen": USER, "rejected": ASSISTANT},
            "`chosen` is no turn of the assistant's",
        ),
        ("pretrain", {"text": None, "id": 3}, r"pretrain needs `text`; the record has `id`, `text` \(null\)"),
        (
            "sft",
            {"messages": [{**USER, "role": "system"}, ASSISTANT], "system": "s"},
            "`system` stands beside messages",
        ),
        ("sft", {"prompt": "q", "completion": "a", "system": "s"}, "`system` stands beside strings"),
        ("sft", {"instruction": "q", "output": "a", "system": 3}, "`system` has to be a string"),
        ("sft", {"instruction": "q", "output": "a", "history": [["h"]]}, r"`history\[0\]` has to be a pair"),
        ("sft", {"instruction": "q", "output": "a", "history": "h"}, "`history` has to be a list of pairs, not str"),
        ("sft", {"messages": [USER, ASSISTANT], "history": [["h", "i"]]}, "`history` stands beside no"),
        ("preference", {"question": "q", "chosen": "The a", "rejected": "The b"}, "`question` is not read in pairs"),
        (
            "preference",
            {"prompt": "q", "chosen": "a", "rejected": "b", "system": "s"},
            "`system` stands beside strings",
        ),
        ("preference", {"prompt": "q", "chosen": "a", "rejected": "b", "history": [["h", "i"]]}, "`history` is not"),
        ("pretrain", {"prompt": "q", "completion": "a"}, "pretrain needs `text`"),
        ("pretrain", {"text": 5}, "`text` has to be a string, not int"),
        ("pretrain", {"text": ""}, "`text` is empty"),
    ],
)
def test_bad_records(kind, record, message):
    with pytest.raises(UserError, match=message) as error:
        read_examples(kind, record, "f:3")
    assert str(error.value).startswith("f:3") and "\n" not in str(error.value)
