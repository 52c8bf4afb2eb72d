"""What the quickstart proposes at its end is accepted, and answers as the evaluation did."""

import importlib.util
import shlex
from pathlib import Path

from llm_jax import generate

SUMMARY = Path(__file__).parents[2] / "experiments" / "quickstart" / "summary.py"


def test_the_proposed_command_is_greedy_and_asks_the_sample():
    spec = importlib.util.spec_from_file_location("summary", SUMMARY)
    assert spec is not None and spec.loader is not None
    summary = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(summary)
    prompt = 'Max\'s bag has 10 "ribbons". How many are $5 worth?'
    module, *argv = shlex.split(summary.proposal("runs/dpo-0123", prompt))[2:]
    assert module == "llm_jax.generate"
    args = generate.make_parser().parse_all(argv)
    assert (args.model, args.prompt, args.temperature) == ("runs/dpo-0123", prompt, 0)
