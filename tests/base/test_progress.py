import io
import sys

from llm_jax.base import progress
from llm_jax.base.progress import Progress, clock, short


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run(monkeypatch, stream, seconds):
    """Ten updates, `seconds` apart, of 1000 tokens each, after 5000 of an earlier process."""
    now = 100.0
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with Progress("packing", "tokens") as line:
        for done in range(5, 15):
            line.update(20, done, tokens=1000.0 * done)
            now += seconds
    return stream.getvalue()


def test_one_line_on_a_terminal(monkeypatch):
    text = run(monkeypatch, Terminal(), 1.0)
    assert text.count("\n") == 0 and text.count("\r") == 10
    # 4000 tokens in 4 s; 11 of 20 are left.
    assert "packing: 9.0k tokens · 1.0k tokens/s · 45% · 0:11 left" in text
    assert text.endswith("\r\x1b[2K")


def test_few_lines_elsewhere(monkeypatch):
    assert run(monkeypatch, io.StringIO(), 1.0) == ""
    assert len(run(monkeypatch, io.StringIO(), 7.0).splitlines()) == 3


def test_numbers():
    assert [short(n) for n in (7, 1234, 5_600_000, 2e9)] == ["7", "1.2k", "5.6M", "2.0G"]
    assert [clock(s) for s in (5, 65.4, 3605)] == ["0:05", "1:05", "1:00:05"]
