"""Models' folders that cannot be read: damage to a Hugging Face folder and to a native one.

Each case is a function that damages a copy. A flipped bit among the raw tensors of a safetensors file is not among
them: the format has no checksum, so such a file is as good as any other.
"""

import json
import pickle
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

Damage = Callable[[Path], object]


class Case(NamedTuple):
    name: str
    kind: str
    """`hf` or `native`: which folder is damaged."""
    door: str
    """`convert` reads weights and architecture; `generate` reads the tokenizer first."""
    damage: Damage


WRONG_NUMBERS: list[Any] = ["x", "", -1, 0, 1.5, [], [3], {}, True, 10**30, float("nan"), float("inf"), "64"]
COUNTS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
          "num_key_value_heads", "head_dim", "max_position_embeddings")  # fmt: skip
OTHERS: dict[str, list[Any]] = {
    "rms_norm_eps": ["x", -1.0, [], {}, True, float("nan"), float("inf"), "1e-5"],
    "rope_theta": ["x", -1.0, 0, [], {}, True, float("nan"), "10000"],
    "rope_parameters": ["x", 3, [1], {"rope_type": "yarn", "factor": 0}, {"rope_type": "default", "rope_theta": "x"},
                        {"rope_type": "default", "factor": 8}, {"rope_type": 3}, {"rope_type": []}, {"rope_theta": -1}],
    "rope_scaling": ["x", 3, [1], {"type": "linear"}, {"type": "linear", "factor": -2}, {"type": {}}],
    "initializer_range": ["x", -1.0, [], True],
    "tie_word_embeddings": ["x", 3, [], {}, "false"],
    "attention_bias": [True, "x", 3, []],
    "mlp_bias": [True, "x", 3, []],
    "hidden_act": ["tanh", 3, [], {}],
    "attention_dropout": [0.5, "x", []],
    "pretraining_tp": [2, "x"],
    "model_type": ["gpt2", "gpt3", "", 3, [], {}, "../llama", "lama"],
    "architectures": [["GPT2LMHeadModel"], "x", 3],
    "sliding_window": [4096],
    "quantization_config": [{"bits": 4}],
    "num_experts": [8],
}  # fmt: skip


def edit_json(file: str, change: Callable[[dict[str, Any]], Any]) -> Damage:
    def damage(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        changed = change(content)
        (folder / file).write_text(json.dumps(content if changed is None else changed))

    return damage


def put(file: str, content: bytes) -> Damage:
    return lambda folder: (folder / file).write_bytes(content)


def remove(file: str) -> Damage:
    return lambda folder: (folder / file).unlink()


def setting(file: str, name: str, value: Any) -> Damage:
    return edit_json(file, lambda content: content.__setitem__(name, value))


def edit_header(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """Changes the header of model.safetensors; the tensors stay where they are."""

    def damage(folder: Path) -> None:
        file = folder / "model.safetensors"
        data = file.read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + size])
        changed = change(header)
        raw = json.dumps(header if changed is None else changed).encode()
        file.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + size :])

    return damage


def edit_bytes(file: str, change: Callable[[bytes], bytes]) -> Damage:
    return lambda folder: (folder / file).write_bytes(change((folder / file).read_bytes()))


def flip(data: bytes, place: int, bit: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]


GARBAGE: list[bytes] = [b"", b"{", b"[]", b"3", b"null", b'"x"', b"\xff\xfe", b"{}", b"[" * 100_000, b"\0" * 64]


def config_cases() -> Iterator[tuple[str, Damage]]:
    for name in COUNTS:
        for value in WRONG_NUMBERS:
            yield f"{name}={value!r}", setting("config.json", name, value)
        if name != "max_position_embeddings":
            yield f"{name} doubled", edit_json("config.json", lambda c, n=name: c.__setitem__(n, c[n] * 2))
            yield f"{name} one more", edit_json("config.json", lambda c, n=name: c.__setitem__(n, c[n] + 1))
    for name, values in OTHERS.items():
        for value in values:
            yield f"{name}={value!r}", setting("config.json", name, value)
    for name in ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"):
        yield f"no {name}", edit_json("config.json", lambda c, n=name: c.pop(n) and None)
    for content in GARBAGE:
        yield f"config.json is {content[:10]!r}", put("config.json", content)
    yield "no config.json", remove("config.json")


def header_cases(names: list[str], rng: random.Random) -> Iterator[tuple[str, Damage]]:
    def entry(change: Callable[[dict[str, Any]], Any]) -> Damage:
        name = rng.choice(names)
        return edit_header(lambda header: change(header[name]))

    for value in ("F33", "", 3, None, [], "f32", "BOOL", "I32", "F64", "F8_E4M3", "I8"):
        yield f"dtype={value!r}", entry(lambda e, v=value: e.__setitem__("dtype", v))
    for value in (None, 3, "x", [], [1], [0], [-1], [10**12], [1.5], ["64"], [[64]], {}, [True], [2**63], [-8, -8]):
        yield f"shape={value!r}", entry(lambda e, v=value: e.__setitem__("shape", v))
    yield "shape negated", entry(lambda e: e.__setitem__("shape", [-n for n in e["shape"]]))
    yield "shape as floats", entry(lambda e: e.__setitem__("shape", [float(n) for n in e["shape"]]))
    yield "shape as text", entry(lambda e: e.__setitem__("shape", [str(n) for n in e["shape"]]))
    wide = [name for name in names if "proj" in name or "embed" in name]
    yield (
        "shape turned",
        edit_header(
            lambda h: h["model.layers.0.mlp.up_proj.weight"].__setitem__(
                "shape", h["model.layers.0.mlp.up_proj.weight"]["shape"][::-1]
            )
        ),
    )
    yield (
        "shape flat",
        edit_header(lambda h: h[wide[0]].__setitem__("shape", [h[wide[0]]["shape"][0] * h[wide[0]]["shape"][1]])),
    )
    for value in (None, 3, "x", [], [0], [0, 1, 2], [-4, 0], [0, -4], [0, 10**12], ["0", "4"], [0.0, 4.0], {}, [4, 0]):
        yield f"data_offsets={value!r}", entry(lambda e, v=value: e.__setitem__("data_offsets", v))
    yield "data_offsets moved", entry(lambda e: e.__setitem__("data_offsets", [o + 4 for o in e["data_offsets"]]))
    yield "data_offsets before", entry(lambda e: e.__setitem__("data_offsets", [o - 4096 for o in e["data_offsets"]]))
    yield (
        "two tensors in one place",
        edit_header(
            lambda h: h["model.layers.1.input_layernorm.weight"].__setitem__(
                "data_offsets", h["model.layers.0.input_layernorm.weight"]["data_offsets"]
            )
        ),
    )
    for name in rng.sample(names, 5):
        yield f"no tensor {name}", edit_header(lambda h, n=name: h.pop(n) and None)
        yield f"{name} renamed", edit_header(lambda h, n=name: h.__setitem__(f"{n}.x", h.pop(n)))
    yield (
        "one tensor more",
        edit_header(lambda h: h.__setitem__("extra", {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]})),
    )
    for field in ("dtype", "shape", "data_offsets"):
        yield f"no {field}", entry(lambda e, f=field: e.pop(f) and None)
    for value in (None, 3, [], "x", {}):
        yield f"an entry is {value!r}", edit_header(lambda h, v=value: h.__setitem__(names[0], v))
    for value in ([], 3, "x", {"a": 1}, {}):
        yield f"the header is {value!r}", edit_header(lambda h, v=value: v)


def file_cases(length: int, header: int, rng: random.Random) -> Iterator[tuple[str, Damage]]:
    file = "model.safetensors"
    for cut in [0, 1, 7, 8, 9, 100, header, 8 + header, *(rng.randrange(1, length) for _ in range(12))]:
        yield f"cut at {cut}", edit_bytes(file, lambda data, c=cut: data[:c])
    for more in (1, 4, 4096):
        yield f"{more} bytes more", edit_bytes(file, lambda data, m=more: data + bytes(m))
    for bit in range(64):
        yield f"bit {bit} of the length", edit_bytes(file, lambda data, b=bit: flip(data, b // 8, b % 8))
    for content in GARBAGE:
        yield f"the file is {content[:10]!r}", put(file, content)
    deep = b'{"a":' * 50_000
    yield "a header nested deep", put(file, struct.pack("<Q", len(deep)) + deep)
    yield "a header that is not UTF-8", put(file, struct.pack("<Q", 4) + b"\xff\xfe{}")
    yield "a pickle for safetensors", put(file, pickle.dumps({"a": 1}))
    yield "no weights", remove(file)
    for name in ("pytorch_model.bin", "model.pt", "consolidated.00.pth", "weights.pkl"):

        def only_pickle(folder: Path, name: str = name) -> None:
            (folder / file).unlink()
            (folder / name).write_bytes(pickle.dumps({"a": 1}))

        yield f"only {name}", only_pickle
    for content in (b"{", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": {"a": 3}}', b'{"weight_map": {}}',
                    b'{"weight_map": {"a": "gone.safetensors"}}', b'{"weight_map": {"a": "../model.safetensors"}}',
                    b'{"weight_map": {"a": null}}', b'{"weight_map": "x"}', b"\xff"):  # fmt: skip

        def only_index(folder: Path, content: bytes = content) -> None:
            (folder / file).rename(folder / "model-00001-of-00001.safetensors")
            (folder / "model.safetensors.index.json").write_bytes(content)

        yield f"index {content[:40]!r}", only_index


def tokenizer_cases(where: str) -> Iterator[tuple[str, Damage]]:
    file = f"{where}tokenizer.json"
    for content in GARBAGE:
        yield f"tokenizer.json is {content[:10]!r}", put(file, content)
    yield "no tokenizer.json", remove(file)
    for key in ("model", "decoder", "pre_tokenizer", "added_tokens"):
        yield f"tokenizer.json: {key}=3", setting(file, key, 3)
    yield (
        "more entries than the embedding",
        edit_json(file, lambda t: t["model"]["vocab"].update({f"more{i}": 10_000 + i for i in range(9)})),
    )
    for content in (b"{", b"[]", b"3", b"\xff", b'{"eos_token": 3}', b'{"eos_token": []}', b'{"eos_token": {}}',
                    b'{"eos_token": "nothing known"}', b"{}", b'{"eos_token": "<|endoftext|>", "chat_template": 3}',
                    b'{"eos_token": "<|endoftext|>", "chat_template": "{% if %}"}',
                    b'{"eos_token": "<|endoftext|>", "bos_token": 3}',
                    b'{"eos_token": "<|endoftext|>", "chat_template": [3]}', b'{"eos_token": null}'):  # fmt: skip

        def without_template_file(folder: Path, content: bytes = content) -> None:
            (folder / f"{where}chat_template.jinja").unlink()
            (folder / f"{where}tokenizer_config.json").write_bytes(content)

        yield f"tokenizer_config.json is {content[:60]!r}", without_template_file
    for content in (b"{% if %}", b"\xff\xfe", b"{{ 1 / 0 }}"):
        yield f"chat_template.jinja is {content!r}", put(f"{where}chat_template.jinja", content)
    for content in (b"{", b"[]", b"3", b"\xff", b'{"eos_token_id": "x"}', b'{"eos_token_id": {}}',
                    b'{"eos_token_id": [null]}', b'{"eos_token_id": 1.5}', b'{"eos_token_id": [[1]]}',
                    b'{"eos_token_id": true}', b'{"eos_token_id": -1}'):  # fmt: skip
        yield f"generation_config.json is {content[:60]!r}", put(f"{where}generation_config.json", content)


def native_cases(folder: Path, rng: random.Random) -> Iterator[tuple[str, Damage]]:
    step = next((folder / "checkpoints").iterdir())
    files = sorted(str(p.relative_to(folder)) for p in step.rglob("*") if p.is_file())
    for _ in range(40):
        file = rng.choice(files)
        size = (folder / file).stat().st_size
        if size:
            place, bit = rng.randrange(size), rng.randrange(8)
            yield (
                f"{Path(file).name} flipped at {place}.{bit}",
                edit_bytes(file, lambda data, p=place, b=bit: flip(data, p, b)),
            )
    for file in files:
        yield f"no {Path(file).name}", remove(file)
        yield f"{Path(file).name} cut", edit_bytes(file, lambda data: data[:-1] if data else b"x")
    commit = f"checkpoints/{step.name}/commit.json"
    for content in GARBAGE:
        yield f"commit.json is {content[:10]!r}", put(commit, content)
    for name, value in (
        ("format", 99),
        ("format", None),
        ("step", 7),
        ("arrays", {}),
        ("files", {}),
        ("hash", "x"),
        ("meta", {}),
    ):
        yield f"commit.json {name}={value!r}", setting(commit, name, value)
    for content in GARBAGE:
        yield f"model.json is {content[:10]!r}", put("model.json", content)
    for name in ("hidden_size", "num_layers", "num_heads", "vocab_size", "rope_theta", "norm_eps", "family"):
        for value in ("x", None, -1, [], {}, True):
            yield f"model.json {name}={value!r}", setting("model.json", name, value)
    for name in ("hidden_size", "num_layers", "vocab_size", "intermediate_size"):
        yield f"model.json {name} one more", edit_json("model.json", lambda c, n=name: c.__setitem__(n, c[n] + 2))
    yield "model.json with a field more", setting("model.json", "nothing", 1)
    for content in (b"{", b"[]", b"3", b"\xff"):
        yield f"hf_extra.json is {content!r}", put("hf_extra.json", content)


def cases(hf: Path, native: Path, seed: int) -> list[Case]:
    rng = random.Random(seed)
    data = (hf / "model.safetensors").read_bytes()
    (header,) = struct.unpack("<Q", data[:8])
    names = [name for name in json.loads(data[8 : 8 + header]) if name != "__metadata__"]
    damages = [*config_cases(), *header_cases(names, rng), *file_cases(len(data), header, rng)]
    found = [Case(f"hf: {name}", "hf", "convert", damage) for name, damage in damages]
    found += [Case(f"hf: {name}", "hf", "generate", damage) for name, damage in tokenizer_cases("")]
    found += [Case(f"native: {name}", "native", "convert", damage) for name, damage in native_cases(native, rng)]
    found += [Case(f"native: {n}", "native", "generate", damage) for n, damage in tokenizer_cases("tokenizer/")]
    return found
