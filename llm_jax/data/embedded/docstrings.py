"""The docstring task: from a signature of the standard library to the first paragraph of its docstring.

Preference pairs put the right docstring over another function's, one cut short, or one with its words shuffled.
Only the first kind needs the prompt, so it is four times as common as each other.
"""

import ast
import functools
import inspect
import random
from collections.abc import Iterator
from typing import NamedTuple

from llm_jax.data.config import EmbeddedConfig
from llm_jax.data.embedded.stdlib_text import Split, modules, place, split_of

VERSION = 1
MIN_WORDS = 4  # "Return self." teaches the end token and little else
# Two answers with their prompts have to share a window of 256.
MAX_CHARACTERS = 160
MAX_SIGNATURE = 100
# One module would otherwise hold a fifth of the held-out pairs.
CAP_PER_MODULE = {"train": 200, "eval": 40}
REJECTED = ("other", "other", "other", "other", "cut", "shuffled")
KINDS = tuple(dict.fromkeys(REJECTED))


class Entry(NamedTuple):
    module: str
    signature: str
    docstring: str


def _signature(node: ast.AST) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {node.name}({bases}):" if bases else f"class {node.name}:"
    assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    prefix = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{prefix} {node.name}({ast.unparse(node.args)}){returns}:"


def _module_entries(name: str, text: str) -> Iterator[Entry]:
    try:
        tree = ast.parse(text)
    except SyntaxError:  # templates and deliberately broken sources
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            paragraph = inspect.cleandoc(ast.get_docstring(node) or "").split("\n\n")[0]
            words = paragraph.split()
            docstring, signature = " ".join(words), _signature(node)
            if len(words) >= MIN_WORDS and len(docstring) <= MAX_CHARACTERS and len(signature) <= MAX_SIGNATURE:
                yield Entry(name, signature, docstring)


def entries(split: Split) -> tuple[Entry, ...]:
    """The task's entries of one side, each docstring once, no held-out docstring also in training."""
    return _sides()[split]


@functools.cache
def _sides() -> dict[Split, tuple[Entry, ...]]:
    seen: set[str] = set()
    sides: dict[Split, list[Entry]] = {"train": [], "eval": []}
    for side in ("train", "eval"):  # training first: what it holds is dropped from the held-out side
        for name, text in modules():
            if split_of(name) != side:
                continue
            found = [e for e in _module_entries(name, text) if e.docstring not in seen]
            kept = {e.docstring: e for e in sorted(found, key=lambda e: place(e.signature + e.docstring))}
            capped = list(kept.values())[: CAP_PER_MODULE[side]]
            # All of them count as seen: what the cap leaves out of training must not come back in another module.
            seen.update(kept)
            sides[side] += capped
        sides[side].sort(key=lambda e: place(e.module + e.signature + e.docstring))
    return {side: tuple(found) for side, found in sides.items()}


def _user(entry: Entry) -> list[dict[str, str]]:
    return [{"role": "user", "content": entry.signature}]


def _assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def _selected(config: EmbeddedConfig, split: Split) -> tuple[Entry, ...]:
    return entries(split)[: config.records if split == "train" else config.eval_records]


def demonstrations(config: EmbeddedConfig, split: Split) -> Iterator[dict]:
    """SFT records: signature as the user's turn, docstring as the assistant's."""
    for entry in _selected(config, split):
        yield {"prompt": _user(entry), "completion": _assistant(entry.docstring)}


def corrupt(entry: Entry, pool: tuple[Entry, ...], rng: random.Random) -> tuple[str, str]:
    """Which of `KINDS`, and a worse docstring of it for the entry's signature; never the right one."""
    kind = rng.choice(REJECTED)
    words = entry.docstring.split()
    if kind == "cut":
        return kind, " ".join(words[: rng.randint(1, max(1, len(words) * 2 // 3))])
    if kind == "shuffled":
        for _ in range(20):
            shuffled = rng.sample(words, len(words))
            if shuffled != words:
                return kind, " ".join(shuffled)
    # Docstrings are distinct within a side, so any other entry's differs. Also for words that are all the same.
    while (other := rng.choice(pool)).docstring == entry.docstring:
        pass
    return "other", other.docstring


def preferences(config: EmbeddedConfig, split: Split) -> Iterator[dict]:
    """Preference records: the right docstring over a corrupted one, and of which `kind` that is."""
    pool = entries(split)
    for entry in _selected(config, split):
        rng = random.Random(f"{VERSION}/{split}/{entry}")
        kind, rejected = corrupt(entry, pool, rng)
        answers = {"chosen": _assistant(entry.docstring), "rejected": _assistant(rejected)}
        yield {"prompt": _user(entry), **answers, "kind": kind}
