"""What a model has to beat: a unigram and an interpolated bigram model of the same tokens, and a compressor.

The two are counted on training rows (on the first 16 million tokens of the training stream, where there are more) and
scored on the predicted tokens of evaluation rows (loss_mask 1), given what a language model is given: the token before,
within the segment.
"""

import lzma
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float, Int

from llm_jax.data.rowset import RowSet

# Contexts seen about equally often share one weight (Jelinek & Mercer 1980).
BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384)
HELD_OUT_SHARE = 0.1
EM_STEPS = 30

# What is counted of larger sets, in as many rows as the stream of training begins with: it has to fit in memory.
COUNTED_TOKENS = 1 << 24

Bigrams = tuple[Int[np.ndarray, "n"], Int[np.ndarray, "n"]]  # (token before, token)


def unigram_nats(train: RowSet, evaluation: RowSet, rows: Sequence[int] | None = None) -> float:
    """Nats, summed over the predicted tokens of evaluation rows, under add-one token frequencies of training rows.

    Args:
      train: rows to count.
      evaluation: rows to score.
      rows: which of the evaluation rows; None for all.
    """
    vocab = train.manifest["vocab_size"]
    _, tokens = _bigrams(train)
    _, targets = _bigrams(evaluation, rows)
    return float(-np.log(_unigram(tokens, vocab)[targets]).sum())


def interpolated_bigram_nats(train: RowSet, evaluation: RowSet, rows: Sequence[int] | None = None) -> float:
    """The same under `w(a) count(a, b) / count(a) + (1 - w(a)) unigram(b)`.

    The weight w depends on how often the context a was seen; it maximises the likelihood of a tenth of the training
    tokens under counts of the rest (expectation maximisation), and all training tokens are counted afterwards.
    """
    vocab = train.manifest["vocab_size"]
    before, tokens = _bigrams(train)
    cut = len(tokens) - max(1, int(len(tokens) * HELD_OUT_SHARE))
    weights = _fit_weights((before[:cut], tokens[:cut]), (before[cut:], tokens[cut:]), vocab)
    bigram, unigram, bucket = _scores((before, tokens), _bigrams(evaluation, rows), vocab)
    weight = weights[bucket]
    return float(-np.log(weight * bigram + (1 - weight) * unigram).sum())


def xz_bits_per_byte(texts: Iterable[str]) -> float:
    """Bits per byte of the texts, joined, under `xz -9`."""
    data = "".join(texts).encode()
    return 8 * len(lzma.compress(data, preset=9)) / len(data)


def _bigrams(rowset: RowSet, rows: Sequence[int] | None = None) -> Bigrams:
    most = COUNTED_TOKENS // rowset.schema["tokens"].shape[0]
    if rows is None and len(rowset) > most:
        stream = rowset.stream(0)
        rows = [stream[place] for place in range(most)]
    columns = rowset.columns("tokens", "loss_mask") if rows is None else rowset.read(rows)
    target = columns["loss_mask"][:, 1:] == 1
    return columns["tokens"][:, :-1][target].astype(np.int64), columns["tokens"][:, 1:][target].astype(np.int64)


def _unigram(tokens: Int[np.ndarray, "n"], vocab: int) -> Float[np.ndarray, "vocab"]:
    return (np.bincount(tokens, minlength=vocab) + 1.0) / (len(tokens) + vocab)


def _scores(
    counted: Bigrams, scored: Bigrams, vocab: int
) -> tuple[Float[np.ndarray, "m"], Float[np.ndarray, "m"], Int[np.ndarray, "m"]]:
    """Bigram and unigram probabilities of the scored tokens, and the bucket of each one's context."""
    keys, counts = np.unique(counted[0] * vocab + counted[1], return_counts=True)
    contexts = np.bincount(counted[0], minlength=vocab)
    wanted = scored[0] * vocab + scored[1]
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    pairs = np.where(keys[places] == wanted, counts[places], 0)
    seen = contexts[scored[0]]
    return pairs / np.maximum(seen, 1), _unigram(counted[1], vocab)[scored[1]], np.searchsorted(BUCKETS, seen, "right")


def _fit_weights(counted: Bigrams, held_out: Bigrams, vocab: int) -> Float[np.ndarray, "buckets"]:
    bigram, unigram, bucket = _scores(counted, held_out, vocab)
    count = np.bincount(bucket, minlength=len(BUCKETS) + 1)
    weights = np.full(len(BUCKETS) + 1, 0.5)
    for _ in range(EM_STEPS):
        weight = weights[bucket]
        share = weight * bigram / (weight * bigram + (1 - weight) * unigram)
        summed = np.bincount(bucket, share, minlength=len(BUCKETS) + 1)
        weights = np.where(count > 0, summed / np.maximum(count, 1), weights)
    # A context never seen has no bigram, and a weight of exactly 1 would give an unseen pair no probability.
    return np.where(np.arange(len(weights)) == 0, 0.0, np.clip(weights, 0.0, 0.999))
