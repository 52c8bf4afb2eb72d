"""The report: self-contained, escaped, and possible at any time."""

import json
import re
from html.parser import HTMLParser

from llm_jax.storage.workdir import Workdir
from llm_jax.training.report import write_report


class Checker(HTMLParser):
    """Fails on tags that don't close in order and on anything fetched from outside."""

    def __init__(self):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag, attrs):
        assert tag not in ("script", "link", "img", "iframe")
        assert not {"src", "href", "onclick"} & {name for name, _ in attrs}
        self.tags.append(tag)
        if tag not in ("meta", "br", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def checked(workdir):
    page = workdir.report.read_text()
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert not re.search(r"https?://|url\(|@import", page)
    return page, checker.tags


def filled(tmp_path) -> Workdir:
    workdir = Workdir(tmp_path / "sft-0123456789ab")
    workdir.path.mkdir()
    config = {
        "format": 1,
        "name": "sft",
        "job": "sft",
        "config": {"train": {"steps": 900, "optimizer": {"beta1": 0.9}}},
    }
    workdir.config.write_text(json.dumps(config))
    lines = [{"step": s, "epoch": s / 100, "loss": 3.0 / s, "odd": None, "perf/step_time": 0.1} for s in range(1, 901)]
    lines.insert(2, {"step": 2, "eval_loss": 2.5})
    workdir.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9')
    sample = {"prompt": "<b>2 & 3</b>", "before": "5?", "after": "2 + 3 = 5\nAnswer: 5"}
    workdir.samples.write_text(json.dumps(sample) + "\n")
    workdir.data.mkdir()
    (workdir.data / "summary.json").write_text(json.dumps({"train": {"rows": 12, "truncated": 0}}))
    folder = workdir.checkpoints / "step_00000900"
    folder.mkdir(parents=True)
    (folder / "commit.json").write_text(json.dumps({"metric": 2.5, "files": {"a": [2_000_000, "x"]}}))
    return workdir


def test_everything_is_on_the_page(tmp_path):
    workdir = filled(tmp_path)
    write_report(workdir)
    page, tags = checked(workdir)
    assert "sft · step 900 of 900<br>" in page
    # loss and perf/step_time over steps, the only axis; eval_loss has one value, which is among the results.
    assert tags.count("polyline") == 2 and tags.count("circle") == 0 and 'id="by-tokens"' not in page
    assert max(len(points.split()) for points in re.findall(r'points="([^"]+)"', page)) <= 301
    for text in ("train.rows", "config.train.optimizer.beta1", "step_00000900", "2.0 MB", "metric 2.5", "eval_loss"):
        assert text in page
    assert "&lt;b&gt;2 &amp; 3&lt;/b&gt;" in page and "<b>2" not in page
    assert "prefers-color-scheme: dark" in page


def test_an_interrupted_run_says_so(tmp_path):
    workdir = filled(tmp_path)
    workdir.metrics.write_text('{"step": 7, "loss": 1.0, "eval_exact_match": 0.4321987}\n')
    write_report(workdir)
    page, _ = checked(workdir)
    assert "step 7 of 900 · not finished" in page
    assert "<th>eval_exact_match</th><td>0.432199</td>" in page


def test_a_run_that_left_nothing_yet(tmp_path):
    workdir = Workdir(tmp_path / "new")
    write_report(workdir)
    assert not workdir.path.exists()
    workdir.path.mkdir()
    write_report(workdir)
    assert checked(workdir)[1].count("h2") == 0
