"""Folders that hold a SentencePiece model and no `tokenizer.json`, as Llama 2's first release."""

from typing import Any

import tokenizers as hf
from etils import epath

from llm_jax.base.errors import UserError
from llm_jax.data.sentencepiece_models import convert
from llm_jax.storage.pointers import refuse_pointer

MODEL_FILE = "tokenizer.model"
# Classes whose ids are the model's own. Others shift them or add to them (XLM-RoBERTa, T5, ...).
PLAIN = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "PreTrainedTokenizer", "TokenizersBackend", "")
# Settings of those classes that the pipeline has taken up, or that mean nothing to `PreTrainedTokenizerFast`.
TAKEN_UP = ("legacy", "sp_model_kwargs", "add_bos_token", "add_eos_token", "use_default_system_prompt", "vocab_file")


def read_model_folder(folder: epath.Path, config: dict[str, Any]) -> tuple[hf.Tokenizer, dict[str, Any]]:
    """The pipeline of a folder's `tokenizer.model`, and `config` as it goes with it.

    As in transformers, a bos comes first where the model has one and `add_bos_token` is not false, an eos last only if
    `add_eos_token` is true, and `added_tokens_decoder` may add tokens behind the model's.

    Raises:
      UserError: as `convert`; the model is a git-LFS pointer; or the ids of the folder's `tokenizer_class` are not
        the model's.
    """
    file = folder / MODEL_FILE
    name = str(config.get("tokenizer_class") or "")
    if name.removesuffix("Fast") not in PLAIN:
        raise UserError(f"{file}: the ids of a {name} are not the model's own: convert it with save_pretrained")
    if config.get("add_prefix_space") is False:
        raise UserError(f"{file}: add_prefix_space=false is not read: convert it with transformers' save_pretrained")
    content = file.read_bytes()
    refuse_pointer(file, content)
    backend, special = convert(content, str(file), first_only=config.get("legacy") is False)
    config = {**special, **{key: value for key, value in config.items() if value is not None}}
    for number, token in sorted((int(n), t) for n, t in (config.get("added_tokens_decoder") or {}).items()):
        made = hf.AddedToken(**{key: value for key, value in token.items() if key != "__type"})
        (backend.add_special_tokens if made.special else backend.add_tokens)([made])
        if backend.token_to_id(made.content) != number:
            raise UserError(f"{file}: the added token {made.content!r} cannot have the id {number}")
    _post_processor(backend, config)
    kept = {key: value for key, value in config.items() if key not in TAKEN_UP}
    return backend, {**kept, "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}


def _post_processor(backend: hf.Tokenizer, config: dict[str, Any]) -> None:
    def text(name: str) -> str | None:
        value = config.get(name)
        return value["content"] if isinstance(value, dict) else value

    bos = text("bos_token") if config.get("add_bos_token", True) else None
    eos = text("eos_token") if config.get("add_eos_token", False) else None
    ids = [(token, backend.token_to_id(token)) for token in (bos, eos) if token is not None]
    if not ids or any(number is None for _, number in ids):
        return
    single = " ".join(part for part in (bos, "$A", eos) if part is not None)
    pair = f"{single} {single.replace('$A', '$B')}"
    made = hf.processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)
    backend.post_processor = made  # pyright: ignore[reportAttributeAccessIssue]
