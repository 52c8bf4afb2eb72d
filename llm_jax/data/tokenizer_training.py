"""Vocabularies trained here, from any texts: byte-level BPE, and SentencePiece's two kinds."""

from collections.abc import Iterable
from typing import Literal

import tokenizers as hf

from llm_jax.base.errors import UserError
from llm_jax.data.sentencepiece_models import convert, train
from llm_jax.data.tokenizers import END_OF_TEXT, PAD, SPECIALS, TURN_END, TURN_START, Tokenizer

# The library reserves memory for as many at once; the largest vocabularies in use have a quarter of a million.
MOST_ENTRIES = 1 << 24
# How text is cut before merging: the pattern of Llama 3 (numbers in runs of up to three digits) and of Qwen 2 (singly).
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{DIGITS}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_bpe(texts: Iterable[str], vocab_size: int, split_digits: bool = True) -> Tokenizer:
    """A byte-level BPE (Sennrich et al. 2016; bytes as in GPT-2), the same for the same texts in the same order.

    Args:
      texts: any strings.
      vocab_size: entries at most, 256 bytes and 4 special tokens included; little text gives fewer.
      split_digits: whether each digit is a token of its own (else runs of up to three).

    Raises:
      UserError: vocab_size is below 260, or there is no text.
    """
    check_bpe_size(vocab_size)
    counted = _Counted(texts)
    backend = hf.Tokenizer(hf.models.BPE())
    pattern = hf.Regex(PATTERN.replace("{DIGITS}", "" if split_digits else "{1,3}"))
    backend.pre_tokenizer = hf.pre_tokenizers.Sequence(
        [
            hf.pre_tokenizers.Split(pattern, behavior="isolated"),
            hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(hf.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(counted, trainer)
    if not counted.characters:
        raise UserError("the tokenizer has no text to be trained on")
    return _trained(backend)


def _trained(backend: hf.Tokenizer) -> Tokenizer:
    """A vocabulary that was trained here, with its special tokens put to use."""
    bos = backend.token_to_id(END_OF_TEXT)
    backend.post_processor = hf.processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", pair=f"{END_OF_TEXT} $A {END_OF_TEXT} $B", special_tokens=[(END_OF_TEXT, bos)]
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,
    }
    return Tokenizer(backend, config)


def train_sentencepiece(
    texts: Iterable[str], vocab_size: int, kind: Literal["bpe", "unigram"], split_digits: bool = True
) -> Tokenizer:
    """A SentencePiece vocabulary in the manner of Gemma's: bytes for what it lacks, no dummy prefix, no normalization.

    Every text comes back, but for `▁`, which comes back as a space. Special tokens are those of `train_bpe`, and
    `<unk>`, which nothing becomes.

    Args:
      texts: any strings.
      vocab_size: entries at most, 256 bytes and 5 special tokens included.
      kind: BPE or Unigram.
      split_digits: whether each digit is a token of its own.

    Raises:
      UserError: there is no text, or vocab_size is too small for its characters.
    """
    data = train(texts, vocab_size, kind, split_digits, PAD, END_OF_TEXT, (TURN_START, TURN_END))
    backend, _ = convert(data, f"the trained SentencePiece {kind}")
    return _trained(backend)


def check_bpe_size(vocab_size: int) -> None:
    """Raises UserError for a size that no BPE trained here can have."""
    if vocab_size < 256 + len(SPECIALS):
        raise UserError(f"tokenizer.vocab_size is {vocab_size}: bytes and special tokens alone take 260")
    if vocab_size > MOST_ENTRIES:
        raise UserError(f"tokenizer.vocab_size is {vocab_size}: it has to be at most {MOST_ENTRIES}")


class _Counted:
    """Texts, and how many characters have gone by."""

    def __init__(self, texts: Iterable[str]):
        self.texts, self.characters = texts, 0

    def __iter__(self):
        for text in self.texts:
            self.characters += len(text)
            yield text
