import math

import numpy as np
import pytest

from llm_jax.data import baselines as B
from llm_jax.data.encode import Sequence
from llm_jax.data.rows import fill_row, lm_schema
from llm_jax.data.rowset import RowSet, write_rowset


def make(folder, documents, vocab, window=64):
    rows = []
    for ids in documents:
        sequence = Sequence(np.array(ids, np.int32), np.ones(len(ids), np.uint8))
        rows.append(fill_row(lm_schema(window), [sequence], np.ones(vocab, np.int32), 0, 0))
    write_rowset(folder, rows, lm_schema(window), {"vocab_size": vocab, "sources": ["x"]})
    return RowSet(folder)


def test_unigram_by_hand(tmp_path):
    train = make(tmp_path / "a", [[0, 1, 1, 2]], 4)  # targets 1, 1, 2
    held_out = make(tmp_path / "b", [[3, 1, 2, 3], [1, 0]], 4)
    wanted = -math.log(3 / 7 * 2 / 7 * 1 / 7 * 1 / 7)
    assert B.unigram_nats(train, held_out) == pytest.approx(wanted)
    assert B.unigram_nats(train, held_out, [1]) == pytest.approx(-math.log(1 / 7))


def test_bigram_approaches_the_entropy_of_a_markov_chain(tmp_path):
    rng = np.random.default_rng(0)
    vocab = 6
    transitions = rng.dirichlet(np.full(vocab, 0.3), vocab)

    def chain(length):
        ids = [0]
        for _ in range(length - 1):
            ids.append(int(rng.choice(vocab, p=transitions[ids[-1]])))
        return ids

    train = make(tmp_path / "a", [chain(64) for _ in range(300)], vocab)
    documents = [chain(64) for _ in range(50)]
    held_out = make(tmp_path / "b", documents, vocab)
    best = -sum(math.log(transitions[a, b]) for ids in documents for a, b in zip(ids, ids[1:]))
    bigram, unigram = B.interpolated_bigram_nats(train, held_out), B.unigram_nats(train, held_out)
    assert best * 0.99 < bigram < best * 1.02 < unigram


def test_bigram_falls_back_where_it_has_seen_nothing(tmp_path):
    train = make(tmp_path / "a", [[0, 1] * 30, [0, 1, 2] * 20], 5)
    held_out = make(tmp_path / "b", [[4, 3, 0, 1], [1, 4, 4]], 5)  # contexts and pairs never seen
    nats = B.interpolated_bigram_nats(train, held_out)
    assert math.isfinite(nats)
    # A context never seen is scored by the unigram alone.
    assert B.interpolated_bigram_nats(train, make(tmp_path / "c", [[4, 1]], 5)) == pytest.approx(
        B.unigram_nats(train, make(tmp_path / "d", [[4, 1]], 5))
    )


def test_xz_of_random_digits_is_near_their_entropy():
    digits = "".join(map(str, np.random.default_rng(0).integers(0, 10, 50_000)))
    assert math.log2(10) < B.xz_bits_per_byte([digits[:20_000], digits[20_000:]]) < 1.15 * math.log2(10)


def test_of_many_rows_a_sample_is_counted(tmp_path, monkeypatch):
    rng = np.random.default_rng(1)
    train = make(tmp_path / "a", rng.integers(0, 6, (400, 64)).tolist(), 6)
    held_out = make(tmp_path / "b", rng.integers(0, 6, (20, 64)).tolist(), 6)
    whole = B.unigram_nats(train, held_out), B.interpolated_bigram_nats(train, held_out)
    monkeypatch.setattr(B, "COUNTED_TOKENS", 100 * 64)
    sampled = B.unigram_nats(train, held_out), B.interpolated_bigram_nats(train, held_out)
    assert sampled != whole and sampled == pytest.approx(whole, rel=0.01)
