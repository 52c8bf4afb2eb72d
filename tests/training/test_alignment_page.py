"""The report of a preference run and of a searched tree: what is drawn, and that it stands alone."""

import json
import re

import pytest

from llm_jax.base.errors import UserError
from llm_jax.training.alignment_page import by_kind
from llm_jax.training.report import write_report
from llm_jax.training.trees import draw
from tests.training.test_report import checked, filled


def node(text, visits, quality, *children, terminal=False):
    numbers = {"value": 0.0, "N": visits, "Q": quality, "V": quality, "logp": -1.5, "tokens": 3}
    return {"text": text, **numbers, "terminal": terminal, "children": list(children)}


TREE = node(
    "",
    8,
    0.0,
    node("13 - 2 = 11.", 6, 0.5, node(" <b>Answer: 11", 5, 1.0, terminal=True), node(" 11 + 5 = 17.", 1, -1.0)),
    node("13 - 2 = 12.", 2, -0.25, node(" 12 + 5 = 17.", 0, 0.0)),
)


def preference_run(tmp_path, **config):
    workdir = filled(tmp_path)
    record = {"name": "dpo", "job": "preference", "config": {"reference": None, **config}}
    workdir.config.write_text(json.dumps(record))
    lines = []
    for step in range(1, 5):
        both = {
            f"{name}/{side}": step * sign for name in METRICS for side, sign in (("chosen", 1.0), ("rejected", -1.0))
        }
        lines.append({"step": step, "rewards/margins": 2.0 * step, "implicit_kl": 0.1 * step, **both})
    lines.append({"step": 4, "eval_rewards/accuracies": 0.75, "eval_rewards/accuracies_answers": 0.5})
    lines[-1] |= {"eval_rewards/accuracies_equations": 0.875, "eval_probs/chosen": 0.25, "eval_probs/rejected": 0.125}
    lines[-1] |= {"eval_exact_match": 0.5, "eval_exact_match/1_steps": 0.625}
    workdir.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return workdir


METRICS = ("rewards", "probs", "logps", "lengths")


def test_both_answers_are_side_by_side(tmp_path):
    workdir = preference_run(tmp_path)
    write_report(workdir)
    page, _ = checked(workdir)
    both = page[page.index("Chosen and rejected") : page.index("Accuracy by kind")]
    for told in ("reward: β", "probability per token", "log-probability, nats", "length, tokens"):
        figure = next(f for f in both.split("<figure>") if f"<span>{told}" in f)
        assert "chosen</span>" in figure and "rejected</span>" in figure
        assert figure.count("<polyline") % 2 == 0 and "<polyline" in figure
    # Of the held-out pairs one point each.
    assert "held-out chosen" in both and both.count("<circle") >= 2
    assert "KL from the reference" in both and ">0.4<" in both and ">8<" in both and ">0.25<" in both
    assert "which is its reference" in page


def test_another_reference_is_said_to_be_one(tmp_path):
    workdir = preference_run(tmp_path, reference="other")
    write_report(workdir)
    assert "not its reference" in checked(workdir)[0]


def test_accuracies_by_kind(tmp_path):
    workdir = preference_run(tmp_path)
    write_report(workdir)
    rows = re.findall(r"<tr>.*?</tr>", checked(workdir)[0].partition("Accuracy by kind")[2].partition("<h2>")[0])
    shown = [re.sub(r"<[^>]+>", "|", row).strip("|").replace("||", "|") for row in rows][1:]
    assert shown == [
        "answers|chosen over rejected|held out|0.5",
        "equations|chosen over rejected|held out|0.875",
        "all|chosen over rejected|held out|0.75",
        "1 steps|right answers|held out|0.625",
        "all|right answers|held out|0.5",
    ]
    assert by_kind({"eval_loss": 1.0, "rewards/accuracies": 1.0}) == ""


def test_a_run_without_preferences_has_no_such_section(tmp_path):
    workdir = filled(tmp_path)
    write_report(workdir)
    page, _ = checked(workdir)
    assert not any(
        title in page for title in ("Chosen and rejected", "Accuracy by kind", "Search trees", "before: the")
    )


def test_trees_are_drawn(tmp_path):
    workdir = preference_run(tmp_path)
    workdir.trees.write_text(json.dumps({"prompt": "How <many>?", "answer": "16", "tree": TREE}) + "\n")
    write_report(workdir)
    page, tags = checked(workdir)
    assert "How &lt;many&gt;? → 16" in page and "&lt;b&gt;Answer: 11" in page
    svg = page[page.index('<svg width="') :]
    svg = svg[: svg.index("</svg>")]
    assert svg.count("<circle") == 5 and svg.count("<rect") == 1  # terminal
    assert svg.count('class="main"') == 2 and svg.count('class="edge"') == 3
    assert "N 6 · Q 0.50" in svg and "1 of 1 steps behind it were never visited" in svg
    assert "log π -1.5 of 3 tokens" in svg


def test_large_trees_are_drawn_without_what_was_never_visited():
    small = node("", 3, 0.0, node("a", 3, 0.5), node("b", 0, 0.0))
    large = node("", 3, 0.0, node("a", 3, 0.5), *(node(f"b{i}", 0, 0.0) for i in range(200)))
    assert draw(small).count("<circle") == 3 and draw(large).count("<circle") == 2
    assert "200 of 201 steps" in draw(large)


def test_trees_that_are_none(tmp_path):
    workdir = preference_run(tmp_path)
    workdir.trees.write_text("[1]\n")
    with pytest.raises(UserError, match=r"trees.jsonl: a line is no object"):
        write_report(workdir)
