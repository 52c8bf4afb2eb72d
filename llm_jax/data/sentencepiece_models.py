# pyright: reportAttributeAccessIssue=false
# (what protobuf and `tokenizers` make at run time, their stubs do not tell)
"""SentencePiece models as `tokenizers` pipelines with the same ids, and their training.

A `tokenizer.model` (BPE or Unigram) becomes a `tokenizers.Tokenizer`, so that offsets, chat templates and
`tokenizer.json` are the same for every vocabulary. Each stretch between special tokens gets the ids that the
`sentencepiece` library gives it alone: a dummy prefix included, if the model has one. What cannot be had that way is
refused, and a made pipeline is compared with the library on PROBES before it is used.

Two things are the library's own. Where a model carries a table of normalization (`nmt_nfkc`), combining marks that do
not follow their letter in canonical order may be normalized otherwise. And a Unigram model's choice between two ways
to write the same stretch hangs, where they score alike, on rounding: the library sums in float32 over a whole text.
Of the models trained here neither holds: they do not normalize, and their scores are multiples of 2^-6.
"""

import io
import itertools
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import sentencepiece
import tokenizers as hf
from sentencepiece import sentencepiece_model_pb2 as schema

from llm_jax.base.errors import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
UNIGRAM, BPE = 1, 2
SPACE = "▁"
# A character that no text is made of (Unicode calls it a noncharacter).
APART = "\ufdd0"
BYTE_LITERAL = r"<(?=0x[0-9A-F]{2}>)"
SCORE_STEP = 2.0**-6
# Texts in which tokenizers differ: spaces, digits, code, scripts, emoji, marks, controls, what no vocabulary holds.
PROBES = (
    'The quick brown fox, 12345 and 6.7e-8: naïve café isn\'t "it".',
    " one  two   three    ",
    "\tdef f(x):\n\n        return [x[0] ** 2, 'a']  # aaaa aaaaaaa\r\n",
    "日本語のテキスト、한국어 텍스트 и русский текст; עברית עם ניקוד",
    "👩‍👩‍👧‍👦 🏳️‍🌈 \u200b\u202e ½ ﬁ Å ǆ ㎏ \U0010fffd",
    "▁▁ already ▁escaped <0x41> ⁇ \x01\x7f",
    "",
    " ",
)
# Of Unigram's suffix array a character takes about 24 bytes of memory.
TRAINING_CHARACTERS = 32_000_000
# A sentence at most: the trainer leaves longer ones out, so texts are cut here.
SENTENCE_CHARACTERS = 16_384


def train(
    texts: Iterable[str],
    vocab_size: int,
    kind: Literal["bpe", "unigram"],
    split_digits: bool,
    pad: str,
    end: str,
    controls: tuple[str, ...],
) -> bytes:
    """A model with bytes for what it lacks, no dummy prefix and no normalization, so that every text comes back.

    Args:
      texts: any strings; the first TRAINING_CHARACTERS of them are learned from.
      vocab_size: entries at most; special tokens and 256 bytes are among them.
      kind: BPE (Sennrich et al. 2016) or Unigram (Kudo 2018).
      split_digits: whether each digit is a token of its own.
      pad, end, controls: special tokens; ids 0, 1 and 3, 4, ...; 2 is `<unk>`, which nothing becomes.

    Raises:
      UserError: there is no text, or vocab_size is too small for the text's characters.
    """
    sentences, model = _sentences(texts), io.BytesIO()
    first = next(sentences, None)
    if first is None:
        raise UserError("the tokenizer has no text to be trained on")
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=itertools.chain([first], sentences),
            model_writer=model,
            model_type=kind,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            split_digits=split_digits,
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            max_sentence_length=8 * SENTENCE_CHARACTERS,
            pad_id=0,
            pad_piece=pad,
            eos_id=1,
            eos_piece=end,
            unk_id=2,
            bos_id=-1,
            control_symbols=list(controls),
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[0].rpartition("] ")[2]
        raise UserError(f"tokenizer.vocab_size is {vocab_size}: sentencepiece refuses: {reason}") from None
    return _rounded(model.getvalue()) if kind == "unigram" else model.getvalue()


def _rounded(data: bytes) -> bytes:
    """A Unigram model with scores of which sums are exact in float32, so that equal ones are equal in any order."""
    model = schema.ModelProto.FromString(data)
    for piece in model.pieces:
        piece.score = round(piece.score / SCORE_STEP) * SCORE_STEP
    return model.SerializeToString()


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    left = TRAINING_CHARACTERS
    for text in texts:
        for start in range(0, min(len(text), left), SENTENCE_CHARACTERS):
            yield text[start : min(start + SENTENCE_CHARACTERS, left)]
        left -= len(text)
        if left <= 0:
            return


def convert(data: bytes, name: str, first_only: bool = False) -> tuple[hf.Tokenizer, dict[str, str]]:
    """A pipeline with the model's ids, and the texts of its special tokens (`bos_token`, ...) as far as it has them.

    Args:
      data: a `tokenizer.model`.
      name: of the file, for messages.
      first_only: puts a dummy prefix before a whole text only, not after special tokens too, and none before a text
        that begins with a space: `"legacy": false` of transformers, which differs from the library there.

    Raises:
      UserError: it is no such model, does what `tokenizers` cannot, or the ids would differ.
    """
    library = sentencepiece.SentencePieceProcessor()
    try:
        model = schema.ModelProto.FromString(data)
        library.LoadFromSerializedProto(data)
    except Exception as error:  # protobuf's DecodeError, the library's RuntimeError
        raise UserError(f"{name} is no SentencePiece model: {str(error).splitlines()[0]}") from None
    _refuse_unlike(model, name)
    backend = hf.Tokenizer(_bpe(model, name) if model.trainer_spec.model_type == BPE else _unigram(model, name))
    spec = model.normalizer_spec
    metaspace = first_only and spec.add_dummy_prefix
    cuts: list[Any] = []
    if model.trainer_spec.model_type == UNIGRAM and model.trainer_spec.byte_fallback:
        # A text that spells `<0x41>` is none of the byte pieces, which the library does not look for in texts.
        cuts.append(hf.pre_tokenizers.Split(hf.Regex(BYTE_LITERAL), "merged_with_previous"))
    steps = _normalizers(model, prefix=spec.add_dummy_prefix and not metaspace, escape=not metaspace)
    backend.normalizer = hf.normalizers.Sequence(steps)
    if metaspace:
        cuts.insert(0, hf.pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False))
    if cuts:
        backend.pre_tokenizer = hf.pre_tokenizers.Sequence(cuts)
    decoders = [hf.decoders.Replace(SPACE, " "), hf.decoders.ByteFallback(), hf.decoders.Fuse()]
    if spec.add_dummy_prefix or spec.remove_extra_whitespaces:
        decoders.append(hf.decoders.Strip(" ", 1, 0))
    backend.decoder = hf.decoders.Sequence(decoders)
    if model.trainer_spec.model_type == BPE:
        own = [p.piece for p in model.pieces if p.type == USER_DEFINED]
        backend.add_tokens([hf.AddedToken(text, special=False, normalized=True) for text in own])
    if not metaspace:
        _compare(backend, library, name)
    # Only now, for the library knows them by id alone; written out, they are these ids, as in transformers.
    special = [p.piece for p in model.pieces if p.type in (UNKNOWN, CONTROL)]
    backend.add_special_tokens([hf.AddedToken(text, special=True, normalized=False) for text in special])
    return backend, _special_names(model)


def _refuse_unlike(model: schema.ModelProto, name: str) -> None:
    spec, kind = model.normalizer_spec, model.trainer_spec.model_type
    user_defined = any(p.type == USER_DEFINED for p in model.pieces)
    for unlike, what in (
        (kind not in (UNIGRAM, BPE), "it is neither BPE nor Unigram"),
        (not spec.escape_whitespaces, "escape_whitespaces is false"),
        (model.trainer_spec.treat_whitespace_as_suffix, "treat_whitespace_as_suffix is set"),
        (bool(model.denormalizer_spec.precompiled_charsmap), "it has a denormalizer"),
        (any(p.type == UNUSED for p in model.pieces), "it has unused pieces"),
        (
            kind == BPE and user_defined and (spec.add_dummy_prefix or bool(spec.precompiled_charsmap)),
            "it has user-defined symbols beside a dummy prefix or a normalization",
        ),
    ):
        if unlike:
            raise UserError(f"{name} is not read: {what}; convert it with transformers' save_pretrained")


def _normalizers(model: schema.ModelProto, prefix: bool, escape: bool) -> list[Any]:
    spec, steps = model.normalizer_spec, []
    if spec.precompiled_charsmap:
        # `Precompiled` looks up graphemes, and of those of several characters loses or passes over some. So each
        # character is one for it, and NFC composes what the table would have.
        steps.append(hf.normalizers.Replace(hf.Regex(r"(?<=.)(?=[^\x00-\x7f])"), APART))
        steps.append(hf.normalizers.Precompiled(spec.precompiled_charsmap))
        steps += [hf.normalizers.Replace(APART, ""), hf.normalizers.NFC()]
    if spec.remove_extra_whitespaces:
        steps.append(hf.normalizers.Replace(hf.Regex(r"\A +"), ""))
        steps.append(hf.normalizers.Replace(hf.Regex(" {2,}"), " "))
    if prefix:
        steps.append(hf.normalizers.Prepend(SPACE))
    if escape:
        steps.append(hf.normalizers.Replace(" ", SPACE))
    if spec.remove_extra_whitespaces:
        steps.append(hf.normalizers.Replace(hf.Regex(rf"[ {SPACE}]+\z"), ""))
    return steps


def _bpe(model: schema.ModelProto, name: str) -> Any:
    """Symbols whose union is the best-scored piece are merged first, the leftmost of equals: rank is score."""
    vocabulary = {p.piece: i for i, p in enumerate(model.pieces)}
    mergeable = {p.piece for p in model.pieces if p.type == NORMAL}
    merges: list[tuple[float, tuple[str, str]]] = []
    for piece in model.pieces:
        if piece.type == NORMAL:
            for cut in range(len(piece.piece) - 1, 0, -1):
                left, right = piece.piece[:cut], piece.piece[cut:]
                if left in mergeable and right in mergeable:
                    merges.append((piece.score, (left, right)))
                elif (cut == 1 and left not in vocabulary) or (len(right) == 1 and right not in vocabulary):
                    raise UserError(f"{name} is not read: {piece.piece!r} is made of a character that is no piece")
    merges.sort(key=lambda merge: -merge[0])
    unknown = model.trainer_spec.unk_piece
    return hf.models.BPE(
        vocabulary,
        [pair for _, pair in merges],
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=model.trainer_spec.byte_fallback,
    )


def _unigram(model: schema.ModelProto, name: str) -> Any:
    """Scores as they are, but those of symbols that are the user's own, as the library scores these."""
    normal = [p for p in model.pieces if p.type == NORMAL]
    known = {p.piece for p in normal}
    # Where every character of a piece is a piece, no choice depends on what an unknown one costs.
    odd = next((p.piece for p in normal if any(character not in known for character in p.piece)), None)
    if odd is not None or not normal:
        raise UserError(f"{name} is not read: its piece {odd!r} has a character that is no piece")
    crossing = next((p.piece for p in normal if "<0x" in p.piece), None)
    if model.trainer_spec.byte_fallback and crossing is not None:
        raise UserError(f"{name} is not read: its piece {crossing!r} may be mistaken for a byte's")
    least, best = min(p.score for p in normal), max(p.score for p in normal)
    pieces = []
    for piece in model.pieces:
        score = piece.score if piece.type == NORMAL else least
        if piece.type == USER_DEFINED:
            score = len(piece.piece.encode()) * best - 0.1
        pieces.append((piece.piece, score))
    unknown = next(i for i, p in enumerate(model.pieces) if p.type == UNKNOWN)
    return hf.models.Unigram(pieces, unk_id=unknown, byte_fallback=model.trainer_spec.byte_fallback)


def _special_names(model: schema.ModelProto) -> dict[str, str]:
    spec, found = model.trainer_spec, {}
    types = {p.piece: p.type for p in model.pieces}
    for name, piece in (("bos", spec.bos_piece), ("eos", spec.eos_piece), ("pad", spec.pad_piece)):
        if types.get(piece) == CONTROL:
            found[f"{name}_token"] = piece
    if types.get(spec.unk_piece) == UNKNOWN:
        found["unk_token"] = spec.unk_piece
    return found


def _compare(backend: hf.Tokenizer, library: sentencepiece.SentencePieceProcessor, name: str) -> None:
    """Raises UserError where the pipeline's ids are not the library's."""
    for text in PROBES:
        if backend.encode(text).ids != library.Encode(text):
            raise UserError(f"{name} is not read: the ids of {text!r} would differ from sentencepiece's")
