"""Runs on one page: what is on it, that it stands alone, and that a browser shows what its buttons say."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llm_jax.base.errors import UserError
from llm_jax.report import parse
from llm_jax.storage.workdir import Workdir
from llm_jax.training.compare import compare
from llm_jax.training.runs import labels, read_run
from tests.training.test_report import Checker, filled

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
ROOT = Path(__file__).parents[2]


def made(path: Path, *, steps: int = 900, rate: float = 1e-3, lines: int = 900, name: str = "sft") -> Workdir:
    """A run that has done `lines` of its `steps` steps, logged every 10: 100 tokens a step, two seconds each."""
    workdir = Workdir(path)
    path.mkdir(parents=True)
    config = {"train": {"steps": steps, "optimizer": {"learning_rate": rate}}, "data": {"window": 8}}
    workdir.config.write_text(json.dumps({"format": 1, "name": name, "job": "sft", "config": config, "parents": {}}))
    with workdir.metrics.open("w") as file:
        for step in range(10, lines + 1, 10):
            line = {"step": step, "loss": 900 * rate + 30 / step, "num_tokens": 100 * step}
            file.write(json.dumps(line | {"total_flos": 6e6 * step, "perf/wall_time": 2.0 * step + 5}) + "\n")
            if step % 100 == 0:
                file.write(json.dumps({"step": step, "eval_loss": 1.0}) + "\n")
    samples = [{"prompt": f"{n} & {n}?", "completion": f"<{path.name} says {n}>", "correct": n > 1} for n in (1, 2)]
    workdir.samples.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return workdir


def checked(page: str) -> list[str]:
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert not re.search(r"//\w|url\(|@import|<script|<link|<img|<iframe|\bsrc=|\bhref=|xmlns", page)
    return checker.tags


def test_what_is_on_the_page(tmp_path):
    fast, slow = made(tmp_path / "fast"), made(tmp_path / "slow", rate=2e-3, lines=250)
    page = compare([str(fast.path), str(slow.path)])
    tags = checked(page)
    # loss and eval_loss over four axes; wall time, tokens and flops are axes and no figures.
    assert tags.count("figure") == 2 and tags.count("polyline") == 2 * 2 * 4
    for axis in ("steps", "tokens", "time", "flops"):
        assert f'id="by-{axis}"' in page and page.count(f'<svg class="by-{axis}"') == 2
    assert "step 250 of 900 · not finished" in page and "step 900 of 900<" in page
    rows = re.findall(r"<tr><th>([\w.]+)</th><td>([^<]*)</td><td>([^<]*)</td></tr>", page)
    assert ("train.optimizer.learning_rate", "0.001", "0.002") in rows
    assert not [row for row in rows if row[0] in ("train.steps", "data.window")]
    assert ("num_tokens", "90000", "25000") in rows
    assert "3 fields that are the same" not in page and "2 fields that are the same" in page
    assert "<th>1 &amp; 1?</th><td>&lt;fast says 1&gt;<b>correct false</b></td><td>&lt;slow says 1&gt;" in page


def test_the_place_of_an_evaluation_on_other_axes(tmp_path):
    """It lies between two lines that have totals: tokens, time and flops are straight in between."""
    workdir = made(tmp_path / "run", lines=100)
    workdir.metrics.write_text(
        '{"step": 10, "loss": 2.0, "num_tokens": 100, "perf/wall_time": 8.0}\n{"step": 15, "eval_loss": 3.0}\n'
        '{"step": 20, "loss": null, "num_tokens": 300, "perf/wall_time": 10.0}\n{"step": 30, "eval_loss": 2.5}\n'
    )
    curves = read_run(workdir.path).curves()
    assert curves["eval_loss"]["tokens"] == [(200, 3.0), (300, 2.5)]
    assert curves["eval_loss"]["time"] == [(9, 3.0), (10, 2.5)]
    assert curves["eval_loss"]["steps"] == [(15, 3.0), (30, 2.5)]
    assert "flops" not in curves["eval_loss"]
    assert curves["loss"]["steps"] == [(10, 2.0)]


def test_names_tell_runs_apart(tmp_path):
    folders = ("a/run", "b/run", "b/other", "c/new")
    runs = [made(tmp_path / folder, lines=20, name="new" if "new" in folder else "sft") for folder in folders]
    assert labels([read_run(run.path) for run in runs]) == ["a/run", "b/run", "other", "new"]
    page = compare([str(run.path) for run in runs])
    assert all(page.count(f"</svg>{name}</") >= 3 for name in ("a/run", "b/run", "other", "new"))


def test_one_run_and_one_that_left_nothing_yet(tmp_path):
    checked(compare([str(filled(tmp_path).path)]))
    new = made(tmp_path / "new", lines=0)
    new.metrics.unlink(missing_ok=True)
    new.samples.unlink()
    assert "step 0 of 900 · not finished" in compare([str(new.path)])


def test_more_runs_than_colours(tmp_path):
    runs = [made(tmp_path / f"run{i}", lines=30) for i in range(18)]
    page = compare([str(run.path) for run in runs])
    keys = re.findall(r'<input type="checkbox" id="run-\d+" checked><svg class="key">.*?style="([^"]*)"', page)
    assert len(keys) == 18 and len(set(keys)) == 18


def report(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llm_jax.report", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def test_the_door(tmp_path):
    made(tmp_path / "one")
    made(tmp_path / "two", lines=40)
    done = report("one", "two", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("wrote report.html (2 runs, ")
    checked((tmp_path / "report.html").read_text())


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "report takes one or more workdirs; see --help"),
        (["one", "--outptu=x"], "unknown argument --outptu=x; the nearest is --output"),
        (["one", "--output"], "--output needs a value: --output=FILE"),
    ],
)
def test_arguments(arguments, said):
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        parse(arguments)


def test_bad_folders(tmp_path):
    one = made(tmp_path / "one", lines=40)
    (tmp_path / "empty").mkdir()
    broken = made(tmp_path / "broken", lines=40)
    for paths, said in (
        (["nowhere"], "nowhere is not a folder"),
        ([str(one.metrics)], "metrics.jsonl is not a folder"),
        ([str(tmp_path / "empty")], "empty is not the workdir of a run"),
        ([str(one.path), str(one.path) + "/."], "one is given 2 times"),
    ):
        with pytest.raises(UserError, match=f"{said}$"):
            compare(paths)
    for text in ('{"step": 1}\nnot json\n', "[1]\n", '{"loss": 1}\n'):
        broken.metrics.write_text(text)
        with pytest.raises(UserError, match="broken/metrics.jsonl: "):
            compare([str(broken.path)])
    refused = report("one", "empty", cwd=tmp_path)
    assert (refused.returncode, refused.stderr) == (2, "error: empty is not the workdir of a run\n")
    refused = report("one", "--output=none/there.html", cwd=tmp_path)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)


def browse(folder: Path, page: str, *options: str) -> tuple[str, list[str]]:
    """What chromium writes on stdout, and the addresses it asked the network for, its own errands left out."""
    (folder / "page.html").write_text(page)
    log = folder / "net.json"
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
    command += ["--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND", f"--log-net-log={log}"]
    command += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=3000", *options]
    ran = subprocess.run([*command, f"file://{folder / 'page.html'}"], capture_output=True, text=True, timeout=120)
    urls = set(re.findall(r'"url":"(\w+://[^"/]*)', log.read_text()))
    own = re.compile(r"(\w+\.)*(google|googleapis|gvt1)\.com")
    return ran.stdout, sorted(url for url in urls if not own.fullmatch(url.partition("://")[2]) and "file:" not in url)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_a_browser_fetches_nothing_and_its_buttons_work(tmp_path):
    runs = [made(tmp_path / name, lines=200) for name in ("a", "b")]
    page = compare([str(run.path) for run in runs])
    probe = """<script>
    const seen = selector => [...document.querySelectorAll(selector)].filter(e => e.getClientRects().length).length;
    const told = [seen('.by-steps'), seen('.by-tokens'), seen('polyline')];
    document.querySelector('#by-tokens').click(); document.querySelector('#run-1').click();
    told.push(seen('.by-steps'), seen('.by-tokens'), seen('polyline'));
    document.title = 'told ' + told.join(' ');
    </script>"""
    shown, urls = browse(tmp_path, page.replace("</body>", probe + "</body>"), "--dump-dom")
    assert "<title>told 2 0 4 0 2 2</title>" in shown
    assert urls == []
    _, urls = browse(tmp_path, page.replace("</body>", '<img src="http://fetched.test/x.png"></body>'), "--dump-dom")
    assert urls == ["http://fetched.test"], "the log would show it"
    browse(tmp_path, page, f"--screenshot={tmp_path / 'page.png'}")
    assert (tmp_path / "page.png").stat().st_size > 10_000
