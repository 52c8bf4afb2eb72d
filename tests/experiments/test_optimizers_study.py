"""The study of update rules: its plot, and (slow) the command itself at test size."""

import importlib.util
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "experiments" / "studies" / "optimizers.py"


def test_the_plot_has_a_curve_and_a_name_for_each_rule(monkeypatch):
    monkeypatch.syspath_prepend(STUDY.parent)
    spec = importlib.util.spec_from_file_location("optimizers_study", STUDY)
    assert spec is not None and spec.loader is not None
    study = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(study)
    drawn = study.svg({"adamw": (4e-3, [(10, 5.0), (20, 4.0)]), "muon": (8e-3, [(10, 4.5), (20, 3.0)])})
    tree = ElementTree.fromstring(drawn)
    lines = [element.attrib["points"] for element in tree if element.tag.endswith("polyline")]
    assert len(lines) == 2 and all(len(points.split()) == 2 for points in lines)
    assert {"adamw 0.004", "muon 0.008"} <= {element.text for element in tree}


@pytest.mark.slow
def test_the_command_at_test_size(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Line {i} says that {i} and {i} are {2 * i}.\n" for i in range(3000)))
    command = [
        sys.executable,
        str(STUDY),
        str(text),
        "--steps",
        "4",
        "--rules",
        "muon",
        "--svg",
        str(tmp_path / "p.svg"),
    ]
    found = subprocess.run(
        [*command, "--config", f"{ROOT / 'configs' / 'pretrain.py'}:test"], capture_output=True, text=True, check=True
    )
    assert "| muon | 0.008: " in found.stdout and (tmp_path / "p.svg").read_text().startswith("<svg")
