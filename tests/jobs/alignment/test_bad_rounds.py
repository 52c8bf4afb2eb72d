"""Bad input of a job of rounds: status 2 and one line that names the thing; nothing sampled that need not be."""

import json
from pathlib import Path

import pytest

from llm_jax.base.door import run_door
from llm_jax.jobs.graph import Node
from llm_jax.main import main
from tests.jobs.alignment.conftest import CONFIG, overrides
from tests.jobs.conftest import CONFIGS

JUDGING = """
import time
def bad(prompts, completions, **columns):
    raise ValueError("no idea")
def slow(prompts, completions, **columns):
    time.sleep(60)
"""
QUESTION = {"question": "How many?", "answer": "#### 4"}


@pytest.fixture
def refused(chain: dict[str, Node], tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "judging.py").write_text(JUDGING)

    def refusal(config: str, *fields: str) -> str:
        given = [f"--config.{name}={value}" for name, value in overrides(chain)]
        given += [f"--config.{field}" for field in fields]
        capsys.readouterr()
        status = run_door(main, [f"--config={config}", "--workdir=w", *given])
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert status == 2 and len(errors) == 1, (status, errors)
        return errors[0]

    return refusal


ANSWERS = ("scorer.kind=answer", "scorer.function=none")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (["method=itertive_dpo"], "config.method=itertive_dpo: expected"),
        (["rounds=0"], "rounds is 0; it must be at least 1"),
        (["seed=-1"], "seed is -1"),
        (["sampling.n=1"], "sampling.n is 1; method=iterative_dpo needs at least 2 samples"),
        (["sampling.seed=3"], "sampling.seed=3 is not read"),
        (["sampling.temperature=0"], "sampling.temperature is 0, and all 3 samples"),
        (["sampling.logprobs=3"], "sampling.logprobs=3 is not read"),
        (["sample_every=2"], "sample_every=2 is not read by method=iterative_dpo"),
        (["scorer.function=judging.worse"], "the module judging has no function worse"),
        (["scorer.function=nowhere.at_all"], "scorer.function=nowhere.at_all: ModuleNotFoundError"),
        (["scorer.kind=reward"], "scorer.model is not set"),
        (["scorer.win_probability=compare"], "scorer.win_probability=compare is not read by method=iterative_dpo"),
        (["pairs.choose=thresholds", "pairs.above=1"], "pairs.below=None with pairs.choose=thresholds"),
        (["pairs.above=1"], "pairs.above=1.0 with pairs.choose=max_min"),
        (["pairs.choose=thresholds", "pairs.above=1", "pairs.below=1"], "pairs.below is 1.0; it must be less than"),
        (["pairs.most=2"], "pairs.most is 2; it must be"),
        (["method=spo", "pairs.choose=all"], "pairs.choose=all is not read by method=spo"),
        (["preference.beta=0"], "preference: beta is 0.0"),
        (["preference.loss_type=sigmod"], "preference: loss_type=sigmod: no such loss; the nearest is sigmoid"),
        (["preference.loss_type=kto"], "preference.loss_type=kto takes unpaired answers"),
        (["preference.loss_type=sppo"], "preference.loss_type=sppo takes probabilities to win, which method=sppo"),
        (["method=sppo"], "preference.loss_type=sigmoid: method=sppo is trained with sppo or sppo_hard"),
        (["method=spin", "sampling.n=1"], "scorer.kind=function is not read by method=spin"),
        (["method=spo", "preference.loss_type=aot"], "preference.loss_type=aot has no loss of a single pair, which"),
        (
            ["method=mcts_dpo", "tree.value=self"],
            "scorer.kind=function is not read by tree.value=self",
        ),
        (
            ["preference.adapter.target_modules=('embed_tokens',)", "task_eval.problems=0"],
            "preference.adapter is on the embedding, which init_from ties",
        ),
        (["preference.init_from=x.py"], "x.py: no such config file"),
        (["preference.data.window=64"], "preference.data is set, but the loop gives each round its own: see data"),
        (["preference.task_eval.problems=3"], "preference.task_eval is set"),
        (["preference.train.batch_size=3", "preference.train.microbatches=2"], "does not divide"),
        (["data.embedded=docstrings"], "data.embedded=docstrings is not read as prompts"),
        (["data.path=gone.jsonl"], "gone.jsonl does not exist"),
        (["data.path=a.jsonl"], "a.jsonl:2: a prompt needs `prompt`"),
        (["data.path=b.jsonl", *ANSWERS], "b.jsonl:2: the prompt comes without an `answer`"),
        (["data.path=c.jsonl"], "task_eval.problems=3: no held-out prompt comes with an answer to check"),
        (
            ["data.path=b.jsonl", "task_eval.problems=0", "data.window=40000"],
            "data.window=40000 is longer than the model's",
        ),
        (["data.window=64", "task_eval.problems=0"], "tokens in each may have"),
        (["data.path=long.jsonl"], "positions leave no room for more"),
    ],
)
def test_what_fields_and_files_tell(refused, tmp_path, fields, said):
    for name, records in {
        "a": [QUESTION, {"text": "x"}, QUESTION],
        "b": [QUESTION, {"prompt": "2 + 2 ="}, QUESTION | {"question": "Why?"}],
        "c": [{"prompt": f"{i} + 2 ="} for i in range(4)],
        "long": [QUESTION, QUESTION | {"question": "word " * 9000}],
    }.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert said in refused(CONFIG, *fields)
    assert not list(tmp_path.glob("**/chunks")) and not list(tmp_path.glob("**/checkpoints"))


def test_online_has_fields_of_its_own(refused):
    config = f"{CONFIGS / 'iterative_dpo.py'}:online_test"
    for field, said in (
        ("rounds=2", "rounds is 2; method=online_dpo is one training"),
        ("data.packing=best_fit", "data.packing=best_fit: method=online_dpo has a pair in each row"),
        ("preference.reference_logps=stored", "preference.reference_logps=stored: method=online_dpo makes"),
    ):
        assert said in refused(config, field)


def test_a_judge_has_to_give_one_score(refused, chain):
    fields = ("scorer.kind=reward", "scorer.function=none", f"scorer.model={chain['sft'].workdir.path}")
    assert "gives logits of next tokens; a reward model gives one score to a text" in refused(CONFIG, *fields)


def test_one_that_never_returns_is_waited_for_as_long_as_it_may_take(refused):
    said = refused(CONFIG, "scorer.function=judging.slow", "scorer.timeout=0.2", "task_eval.problems=0")
    assert "problem 0: scorer.function=judging.slow did not return within 0.2 s" in said


def test_where_failures_are_left_out_they_are_counted(refused, tmp_path):
    """The run that failed goes on so, from the samples it has."""
    fields = ("scorer.function=judging.bad", "task_eval.problems=0", "prompts_per_round=2")
    assert "problem 0: scorer.function=judging.bad raised ValueError: no idea" in refused(CONFIG, *fields)
    journal = tmp_path / "w" / "rounds" / "01" / "journal" / "000000.jsonl"
    before = journal.stat().st_mtime_ns
    said = refused(CONFIG, *fields, "scorer.on_error=skip")
    assert "round 1 came to 0 pairs, and training needs two" in said and "skipped 2" in said
    assert journal.stat().st_mtime_ns == before
