"""Makes tests/golden/chat_tools.json: conversations with tools as transformers renders them with templates of TRL.

Run with transformers 5.23 and trl 1.16: `python tests/oracles/chat_tools.py`.
"""

import json
import pathlib

import trl
from transformers.utils.chat_template_utils import render_jinja_template

TEMPLATES = ("qwen2_5_training", "qwen3_training", "llama3_1")
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds two numbers – exactly.",
            "parameters": {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}},
        },
    },
    {"type": "function", "function": {"name": "now", "description": "<b>time</b>", "parameters": {}}},
]


def call(name: str, **arguments) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


SYSTEM, USER = {"role": "system", "content": "Be exact."}, {"role": "user", "content": "What is 2 + 3, café?"}
CALLING = {"role": "assistant", "content": None, "tool_calls": [call("add", a=2, b=3)]}
TOLD, ANSWER = {"role": "tool", "name": "add", "content": "5"}, {"role": "assistant", "content": "It is 5."}
MORE = [{"role": "user", "content": "And now?"}, {"role": "assistant", "content": "Still 5."}]
SAID = {"role": "assistant", "content": "Let me see.", "tool_calls": [call("add", a=1, b=1), call("now")]}
CONVERSATIONS = [
    {"messages": [SYSTEM, USER, CALLING, TOLD, ANSWER, *MORE], "tools": TOOLS},
    {"messages": [USER, CALLING, TOLD, ANSWER], "tools": TOOLS[:1]},
    {"messages": [SYSTEM, USER, SAID, TOLD, {**TOLD, "content": "noon"}, ANSWER], "tools": TOOLS},
    {"messages": [SYSTEM, USER, ANSWER, *MORE], "tools": None},
    {"messages": [SYSTEM, USER, ANSWER], "tools": TOOLS},
]


def rendered(template: str, conversation: dict) -> dict | None:
    messages = [{k: v for k, v in m.items() if v is not None} for m in conversation["messages"]]  # as transformers does
    try:
        texts, spans = render_jinja_template(
            [messages], conversation["tools"], chat_template=template, return_assistant_tokens_mask=True
        )
    except Exception as error:  # llama3_1 takes one call at a time
        assert "single tool-calls" in str(error), error
        return None
    return {"text": texts[0], "spans": spans[0]}


def main() -> None:
    folder = pathlib.Path(trl.__file__).parent / "chat_templates"
    templates = {name: (folder / f"{name}.jinja").read_text() for name in TEMPLATES}
    found = {name: [rendered(text, c) for c in CONVERSATIONS] for name, text in templates.items()}
    golden = {"templates": templates, "conversations": CONVERSATIONS, "rendered": found}
    target = pathlib.Path(__file__).parents[1] / "golden" / "chat_tools.json"
    target.write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
