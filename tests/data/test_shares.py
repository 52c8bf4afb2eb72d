from fractions import Fraction

import pytest

from llm_jax.base.errors import UserError
from llm_jax.data.config import DataConfig, SourceConfig
from llm_jax.data.corpus import check
from llm_jax.data.shares import Shares, source_names


@pytest.mark.parametrize(
    "weights",
    [(1.0,), (1.0, 1.0), (0.7, 0.2, 0.1), (3, 1, 1, 1, 1), (0.001, 5.0, 0.3), (1, 1, 2, 3, 5, 8, 13, 21), (0.1,) * 7],
)
def test_every_prefix_has_its_shares(weights):
    shares = Shares(weights)
    assert shares.shares == [Fraction(str(w)) / sum(Fraction(str(v)) for v in weights) for w in weights]
    counts = [0] * len(weights)
    for row in range(10_000):
        source, number = shares.at(row)
        assert number == counts[source]  # each source's rows come in their order, none left out
        counts[source] += 1
        assert all(abs(n - (row + 1) * share) < 2 for n, share in zip(counts, shares.shares, strict=True))
    # The measure that mixtures are held to: within 1% over 10^4 rows.
    assert all(abs(n / 10_000 - share) < 0.0002 for n, share in zip(counts, shares.shares, strict=True))


def test_two_sources_by_hand():
    # Of the first n rows round(3 n / 4) are from the first source: 1, 2, 2, 3, 4, 5, 5, 6.
    assert [Shares([3, 1]).at(row) for row in range(8)] == [
        (0, 0), (0, 1), (1, 0), (0, 2), (0, 3), (0, 4), (1, 1), (0, 5)
    ]  # fmt: skip
    # Far along it is the same arithmetic.
    assert Shares([3, 1]).at(4 * 10**15) == (0, 3 * 10**15)


def test_names():
    mixture = [SourceConfig("a/wiki.jsonl.gz"), SourceConfig("b/books/"), SourceConfig("x", name="code")]
    assert source_names(mixture) == ["wiki", "books", "code"]
    assert source_names([SourceConfig("hub:org/set"), SourceConfig("seqio:tasks:news")]) == ["set", "news"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixture": (SourceConfig("{a}", weight=0.0),)}, r"data.mixture\[0\].weight is 0.0: it has to be above 0"),
        ({"mixture": (SourceConfig("{a}"), SourceConfig("{a}"))}, "two sources are called a"),
        ({"mixture": (SourceConfig("{a}", name="a/b"),)}, r"data.mixture\[0\].name='a/b'"),
        ({"mixture": (SourceConfig("{a}", max_records=0),)}, r"data.mixture\[0\].max_records is 0"),
        ({"mixture": (SourceConfig("{a}", eval_path="nonesuch.txt"),)}, "nonesuch.txt does not exist"),
        ({"mixture": (SourceConfig("{a}"),), "path": "{a}"}, "data.path is set, but data.mixture replaces it"),
        ({"mixture": (SourceConfig("{a}"),), "eval_path": "{a}"}, "data.eval_path is set, but data.mixture"),
        ({"mixture": (SourceConfig("{a}"),), "embedded": "docstrings"}, "data.mixture replaces the embedded data"),
    ],
)
def test_bad_mixtures(tmp_path, changes, message):
    (tmp_path / "a.txt").write_text("text")
    put = lambda text: text.replace("{a}", str(tmp_path / "a.txt"))  # noqa: E731
    if "path" in changes or "eval_path" in changes:
        changes = {name: put(value) if isinstance(value, str) else value for name, value in changes.items()}
    mixture = tuple(SourceConfig(put(s.path), s.weight, s.name, s.eval_path, s.max_records) for s in changes["mixture"])
    with pytest.raises(UserError, match=message):
        check(DataConfig(**{**changes, "mixture": mixture}))
