"""One wrapper over the `tokenizers` library, for the vocabularies trained here and for Hugging Face folders.

The BPE trained here holds every byte, so that any text and any bytes come back exactly:
`decode_bytes(encode_bytes(b)) == b` for all bytes, and `decode(encode(s)) == s` for every string UTF-8 can hold
(with `errors="surrogateescape"`, also for strings that carry undecodable bytes in Python's way).
Its `tokenizer.json` gives the same ids in `transformers`.
"""

import copy
import functools
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tokenizers as hf
from etils import epath
from jaxtyping import Int

from llm_jax.base.errors import UserError
from llm_jax.data.sentencepiece_folders import MODEL_FILE, read_model_folder
from llm_jax.data.templating import load_template, render_marked
from llm_jax.storage.atomic import write_atomically
from llm_jax.storage.hashes import file_sha256
from llm_jax.storage.json_files import read_json
from llm_jax.storage.pointers import refuse_pointer

PAD, END_OF_TEXT, TURN_START, TURN_END = "<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIALS = (PAD, END_OF_TEXT, TURN_START, TURN_END)
SPECIAL_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")
# What `load_tokenizer` reads of a folder; the model only where there is no tokenizer.json.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    MODEL_FILE,
)


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary, as in GPT-2."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


class Tokenizer:
    """Text to ids and back.

    Attributes:
      backend: the `tokenizers.Tokenizer`, its post-processor included.
      config: contents of `tokenizer_config.json`, written back as they were read.
      chat_template: Jinja text, or None.
      bos_id, eos_id, pad_id: ids that open a document, end it, and fill rows. `bos_id` is None where there is none.
    """

    def __init__(self, backend: hf.Tokenizer, config: dict[str, Any], chat_template: str | None = None):
        self.backend = backend
        self.config = config
        self.chat_template = chat_template
        # Without a post-processor offsets are exact (byte-level ones trim spaces) and nothing is added.
        stripped = json.loads(backend.to_str())
        stripped["post_processor"] = None
        self._plain = hf.Tokenizer.from_str(json.dumps(stripped))
        self._byte_level = "ByteLevel" in json.dumps(stripped["decoder"])
        eos = self._special_id("eos_token")
        if eos is None:
            raise UserError("the tokenizer names no eos_token: documents and answers could not be ended")
        self.eos_id: int = eos
        self.bos_id = self._special_id("bos_token")
        pad = self._special_id("pad_token")
        self.pad_id = eos if pad is None else pad

    def special(self, name: str) -> str | None:
        """The text of `bos_token`, `eos_token`, `pad_token` or `unk_token`; None where there is none."""
        value = self.config.get(name)
        return value["content"] if isinstance(value, dict) else value

    def _special_id(self, name: str) -> int | None:
        text = self.special(name)
        return None if text is None else self.backend.token_to_id(text)

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest id, added tokens included."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @functools.cached_property
    def end_of_turn_id(self) -> int:
        """The token after which an assistant's turn is over: what the chat template writes there, or else eos."""
        if self.chat_template is not None:
            said = "answer"
            turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": said}]
            text, _ = render_marked(self.chat_template, turns, self.template_variables)
            for token in self.encode(text[text.rindex(said) + len(said) :]):
                if token in self.special_ids:
                    return token
        return self.eos_id

    @property
    def template_variables(self) -> dict[str, str | None]:
        """The special tokens' texts, by the names chat templates use."""
        return {name: self.special(name) for name in SPECIAL_NAMES}

    @functools.cached_property
    def fingerprint(self) -> str:
        """12 hex digits over vocabulary, special tokens and chat template: equal means equal ids for every record."""
        parts = [self.backend.to_str(), *(str(self.special(n)) for n in ("bos_token", "eos_token", "pad_token"))]
        return hashlib.sha256("\0".join([*parts, str(self.chat_template)]).encode()).hexdigest()[:12]

    def with_chat_template(self, template: str | None) -> "Tokenizer":
        """The same tokenizer with another chat template."""
        other = copy.copy(self)
        other.chat_template = template
        for name in ("end_of_turn_id", "fingerprint"):  # what is kept of them depends on the template
            other.__dict__.pop(name, None)
        return other

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Ids of a text. Special tokens written out in it (`<|im_end|>`) become their ids, as in transformers.

        Args:
          text: any string; bytes escaped as surrogates (`errors="surrogateescape"`) need a byte-level vocabulary.
          add_special_tokens: whether the post-processor adds what it adds (a bos, for most): for plain prompts.

        Raises:
          UserError: the text holds a surrogate that stands for no byte, or for one and the vocabulary has no bytes.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            try:
                ids = self.encode_bytes(text.encode("utf-8", "surrogateescape"))
            except UnicodeEncodeError:
                raise UserError("the text holds half of a surrogate pair, which is not UTF-8") from None
            return [*self.encode("", add_special_tokens=True), *ids] if add_special_tokens else ids
        return (self.backend if add_special_tokens else self._plain).encode(text).ids

    def encode_batch(
        self, texts: Sequence[str], add_special_tokens: bool = False, offsets: bool = True
    ) -> list[hf.Encoding]:
        """Encodings (`.ids`, and `.offsets` in characters) of many texts, over the machine's cores.

        Without `offsets`, which are then wrong, it takes a quarter less time.
        """
        backend = self.backend if add_special_tokens else self._plain
        return backend.encode_batch(list(texts)) if offsets else backend.encode_batch_fast(list(texts))

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False, errors: str = "replace") -> str:
        """The text of ids. `errors` says what becomes of bytes that are not UTF-8, as in `bytes.decode`."""
        ids = [int(i) for i in ids]
        if not self._byte_level:
            return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)
        if skip_special_tokens:
            ids = [i for i in ids if i not in self.special_ids]
        return self.decode_bytes(ids).decode("utf-8", errors)

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        return frozenset(i for i, token in self.backend.get_added_tokens_decoder().items() if token.special)

    @functools.cached_property
    def special_texts(self) -> tuple[str, ...]:
        return tuple(self._added[i] for i in sorted(self.special_ids))

    def encode_bytes(self, data: bytes) -> list[int]:
        """Ids of any bytes: runs of UTF-8 as text, each other byte by its own token.

        Raises:
          UserError: the vocabulary is not byte-level.
        """
        if not self._byte_level:
            raise UserError("this tokenizer has no byte-level vocabulary: it reads UTF-8 text only")
        vocabulary = self.backend.get_vocab()
        byte_ids = {byte: vocabulary[char] for char, byte in _byte_alphabet().items()}
        ids: list[int] = []
        while data:
            try:
                return ids + self._plain.encode(data.decode("utf-8")).ids
            except UnicodeDecodeError as error:
                ids += self._plain.encode(data[: error.start].decode("utf-8")).ids
                ids += [byte_ids[byte] for byte in data[error.start : error.end]]
                data = data[error.end :]
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of ids of a byte-level vocabulary; special tokens as their names. Unknown ids give nothing."""
        return b"".join(self._bytes_of(int(i)) for i in ids)

    @functools.cached_property
    def _added(self) -> dict[int, str]:
        return {i: token.content for i, token in self.backend.get_added_tokens_decoder().items()}

    def _bytes_of(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self.backend.id_to_token(token_id)
        if token is None:
            return b""
        if self._byte_level:
            return bytes(_byte_alphabet()[char] for char in token)
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):  # byte fallback of SentencePiece
            return bytes([int(token[3:5], 16)])
        return token.replace("▁", " ").encode()

    @functools.cached_property
    def token_bytes(self) -> Int[np.ndarray, "vocab"]:
        """int32: UTF-8 bytes of text that each id stands for; 0 for special tokens. For losses per byte.

        Exact for byte-level vocabularies. SentencePiece ones may count a space that they put before a text.
        """
        counts = [0 if i in self.special_ids else len(self._bytes_of(i)) for i in range(self.vocab_size)]
        return np.array(counts, np.int32)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes `tokenizer_config.json`, `chat_template.jinja` and `tokenizer.json`, which transformers reads.

        `tokenizer.json` comes last: where it is, all are.
        """
        folder = epath.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {key: value for key, value in self.config.items() if key != "chat_template"}
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        write_atomically(folder / "tokenizer_config.json", text)
        if self.chat_template is not None:
            write_atomically(folder / "chat_template.jinja", self.chat_template)
        write_atomically(folder / "tokenizer.json", self.backend.to_str(pretty=True))


def load_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer:
    """Reads a Hugging Face folder or one that `Tokenizer.save` wrote.

    Raises:
      UserError: there is neither `tokenizer.json` nor `tokenizer.model`, a file is broken or a git-LFS pointer, no
        eos_token is named.
    """
    folder = epath.Path(folder)
    file = folder / "tokenizer.json"
    config = _read_json(folder / "tokenizer_config.json")
    for name, value in _read_json(folder / "special_tokens_map.json").items():
        if config.get(name) is None:
            config[name] = value
    _check_specials(folder, config)
    template = _chat_template(folder, config)
    if file.exists():
        content = file.read_bytes()
        refuse_pointer(file, content)
        try:
            backend = hf.Tokenizer.from_str(content.decode())
        except Exception as error:  # the library raises bare Exceptions
            raise UserError(f"{file} is not a tokenizer: {str(error).splitlines()[0]}") from None
        # Fixed lengths are for batches of a server; rows are filled and cut here.
        backend.no_padding()
        backend.no_truncation()
    elif (folder / MODEL_FILE).exists():
        backend, config = read_model_folder(folder, config)
    else:
        others = [n for n in ("vocab.json", "spiece.model") if (folder / n).exists()]
        has = f" (only {others[0]}: convert it with transformers' save_pretrained)" if others else ""
        raise UserError(f"{folder} has no tokenizer.json{has}")
    return Tokenizer(backend, config, template)


def has_tokenizer(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a file that `load_tokenizer` reads a vocabulary from."""
    return any((epath.Path(folder) / name).exists() for name in ("tokenizer.json", MODEL_FILE))


def tokenizer_manifest(folder: str | os.PathLike[str]) -> dict[str, str]:
    """Stands for the content of a tokenizer's folder: its fingerprint, and hashes of the files beside tokenizer.json.

    Raises UserError as `load_tokenizer` does.
    """
    folder = epath.Path(folder)
    beside = {name: file_sha256(folder / name) for name in TOKENIZER_FILES[1:] if (folder / name).exists()}
    return {"fingerprint": load_tokenizer(folder).fingerprint, **beside}


def _read_json(file: epath.Path) -> dict[str, Any]:
    return read_json(file) if file.exists() else {}


def _chat_template(folder: epath.Path, config: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.exists():
        return load_template(str(file))
    template = config.get("chat_template")
    if isinstance(template, list) and all(isinstance(e, dict) and {"name", "template"} <= e.keys() for e in template):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")  # several named ones
    if template is not None and not isinstance(template, str):
        raise UserError(f"{folder / 'tokenizer_config.json'}: chat_template is neither a text nor a list of named ones")
    return template


def _check_specials(folder: epath.Path, config: dict[str, Any]) -> None:
    for name in SPECIAL_NAMES:
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if value is not None and not isinstance(text, str):
            raise UserError(f"{folder / 'tokenizer_config.json'}: {name} is {value!r}, which is no token")
