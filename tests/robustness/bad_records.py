"""Data files that cannot be used: valid records of every format with one thing broken, and broken files."""

import copy
import gzip
import json
import random
from collections.abc import Iterator
from typing import Any, NamedTuple


class Case(NamedTuple):
    name: str
    job: str
    content: bytes
    suffix: str = "jsonl"


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


CHAT = [turn("user", "Say a word."), turn("assistant", "One.")]
TWO = [turn("assistant", "Two.")]

# A valid record of each format a job reads, and the fields without which it is none.
FORMATS: dict[str, list[tuple[dict[str, Any], list[str]]]] = {
    "pretrain": [({"text": "Some text to learn."}, ["text"])],
    "sft": [
        ({"prompt": "Say a word.", "completion": "One."}, ["prompt", "completion"]),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, ["prompt", "completion"]),
        ({"messages": CHAT}, ["messages"]),
        ({"instruction": "Say a word.", "input": "", "output": "One."}, ["instruction", "output"]),
        (
            {"conversations": [{"from": "human", "value": "Say a word."}, {"from": "gpt", "value": "One."}]},
            ["conversations"],
        ),
        ({"instruction": "Add word.", "instances": [{"input": "1 1", "output": "2"}]}, ["instruction", "instances"]),
    ],
    "dpo": [
        ({"prompt": "Say a word.", "chosen": "One.", "rejected": "Two."}, ["prompt", "chosen", "rejected"]),
        ({"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": TWO}, ["prompt", "chosen", "rejected"]),
        ({"chosen": CHAT, "rejected": [CHAT[0], *TWO]}, ["chosen", "rejected"]),
    ],
}  # fmt: skip

WRONG: list[Any] = [None, 3, 2.5, True, [], {}, [1], [None], [[]], {"a": 1}, [{"role": 3, "content": "x"}], [{}],
                    [{"role": "user"}], [{"content": "x"}], [{"role": "user", "content": 3}], [[[[1]]]],
                    [{"from": "human"}], [{"value": "x"}], [{"role": None, "content": None}], ["text", 3]]  # fmt: skip

LINES: list[bytes] = [
    b"{", b"}", b"[]", b"3", b'"text"', b"null", b"true", b'{"prompt": }', b"{'prompt': 'a', 'completion': 'b'}",
    b'{"prompt": "a", "completion": "b",}', b'{"prompt": "a" "completion": "b"}',
    b'{"prompt": "a", "completion": "b"} x',
    b'{"prompt": "a", "completion": "b"}{"prompt": "a", "completion": "b"}', b"prompt,completion", b"<html>", b"\x00",
    b'{"prompt": "a\nb", "completion": "b"}', b'{"prompt": "\\x41", "completion": "b"}',
    b'{"prompt": "\xff\xfe", "completion": "b"}', b'{"prompt": "a", "completion": "\xc3\x28"}', b"\xff\xfe{\x00}\x00",
    b'{"prompt": "\\ud83d", "completion": "b"}', b'{"prompt": "a", "completion": "\\udc00 x"}',
    b'{"prompt": "a", "completion": ["\\ud800"]}', b'{"\\ud800": 1, "prompt": "a", "completion": "b"}',
    b'{"prompt": "a", "completion": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", b"[" * 5000, b'{"a":' * 5000,
    b'{"prompt": ' + b"1" * 5000 + b', "completion": "b"}', b'{"prompt": 1e999, "completion": "b"}',
    b'{"prompt": NaN, "completion": "b"}', b'{"prompt": "a", "completion": Infinity}',
    b'{"prompt": "", "completion": "b"}', b'{"prompt": [], "completion": []}', b"{}", b'{"": ""}', b'{"text": ""}',
]  # fmt: skip


def lines(*records: Any) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def numbered(record: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """Different records like the one given, so that some are trained on and some held out."""
    return [json.loads(json.dumps(record).replace("word", f"word {i}").replace("text", f"text {i}", 1)
                       if "text" not in record else json.dumps({"text": f"Some text {i} to learn."}))
            for i in range(count)]  # fmt: skip


def broken(record: dict[str, Any], needed: list[str], rng: random.Random) -> Iterator[tuple[str, Any]]:
    """The record with one thing wrong in it."""
    for name in needed:
        without = {key: value for key, value in record.items() if key != name}
        # A pair's prompt may be found in its answers, and messages hold theirs.
        if not (name == "prompt" and {"chosen", "rejected"} <= record.keys()):
            yield f"without {name}", without
        for value in WRONG:
            if type(value) is type(record[name]) and value and _fits(value, record[name]):
                continue
            yield f"{name}={value!r}"[:60], {**record, name: value}
        wrong = rng.choice([name.upper(), name + " ", name[:-1], "_" + name])
        if not (name == "prompt" and {"chosen", "rejected"} <= record.keys()):
            yield f"{wrong} for {name}", {**without, wrong: record[name]}
        if not isinstance(record[name], str):
            yield from _broken_lists(name, record, rng)


def _fits(value: Any, like: Any) -> bool:
    return isinstance(value, str) and isinstance(like, str)


def _broken_lists(name: str, record: dict[str, Any], rng: random.Random) -> Iterator[tuple[str, Any]]:
    for index, item in enumerate(record[name]):
        for key in item:
            if key == "input":
                continue
            bad = copy.deepcopy(record)
            del bad[name][index][key]
            yield f"{name}[{index}] without {key}", bad
            for value in (3, None, {}, [3], [{"type": "image_url"}], [{"type": "text"}], [{"type": "text", "text": 3}]):
                bad = copy.deepcopy(record)
                bad[name][index][key] = value
                yield f"{name}[{index}].{key}={value!r}", bad
        for value in (None, 3, "x", [], [1]):
            bad = copy.deepcopy(record)
            bad[name][index] = value
            yield f"{name}[{index}]={value!r}", bad
    for extra in ("tool_calls", "function_call", "reasoning_content"):
        if name == "messages":
            bad = copy.deepcopy(record)
            bad[name][-1][extra] = [{"name": "f"}]
            yield f"{name} with {extra}", bad


def cases(seed: int) -> list[Case]:
    rng = random.Random(seed)
    found: list[Case] = []
    for job, formats in FORMATS.items():
        for record, needed in formats:
            good = numbered(record, 6)
            for name, bad in broken(record, needed, rng):
                place = rng.randrange(1, 6)
                content = lines(*good[:place], bad, *good[place:])
                found.append(Case(f"{job} {'+'.join(needed)}: {name}", job, content))
    for number, line in enumerate(LINES):
        good = [json.dumps(record).encode() for record in numbered(FORMATS["sft"][0][0], 6)]
        job = "pretrain" if line == b'{"text": ""}' else "sft"
        if job == "pretrain":
            good = [json.dumps(record).encode() for record in numbered(FORMATS["pretrain"][0][0], 6)]
        found.append(Case(f"line {number} {line[:40]!r}", job, b"\n".join([*good[:3], line, *good[3:]]) + b"\n"))
    found += _files(rng)
    return found


def _files(rng: random.Random) -> Iterator[Case]:
    whole = lines(*numbered(FORMATS["sft"][0][0], 200))
    packed = gzip.compress(whole, mtime=0)
    for i in range(20):
        cut = rng.randrange(1, len(packed) - 1)
        yield Case(f"gzip cut at {cut}", "sft", packed[:cut], "jsonl.gz")
        flipped = bytearray(packed)
        flipped[rng.randrange(10, len(packed))] ^= 1 << rng.randrange(8)  # the first ten bytes are a header
        yield Case(f"gzip flipped {i}", "sft", bytes(flipped), "jsonl.gz")
    yield Case("gzip that is none", "sft", whole, "jsonl.gz")
    yield Case("gzip and rubbish after it", "sft", packed + b"rubbish", "jsonl.gz")
    yield Case("gzip within gzip", "sft", gzip.compress(packed), "jsonl.gz")
    for name, content in (("empty", b""), ("blank", b"\n\n \n"), ("one", lines({"prompt": "a", "completion": "b"})),
                          ("gzip of nothing", gzip.compress(b"")), ("nothing in gz", b"")):  # fmt: skip
        yield Case(f"file: {name}", "sft", content, "jsonl.gz" if "g" in name and "z" in name else "jsonl")
    yield Case("all alike", "sft", lines(*[{"prompt": "a", "completion": "b"}] * 9))
    for suffix in ("csv", "json", "txt", "parquet.bak", "bin", ""):
        yield Case(f"ending {suffix!r}", "sft", whole, suffix)
    yield Case("text that is not UTF-8", "pretrain", b"abc \xff\xfe\n" * 9, "txt")
    yield Case("UTF-16", "pretrain", "some text\n".encode("utf-16") * 9, "txt")
    yield Case("no text", "pretrain", b"", "txt")
