"""What a run of rounds leaves, and what its makers make of samples."""

import json
from dataclasses import replace

import numpy as np
import pytest

from llm_jax.base.errors import UserError
from llm_jax.base.trees import flatten
from llm_jax.data import examples
from llm_jax.data.config import DataConfig
from llm_jax.data.encode import encode_examples
from llm_jax.data.examples import Pair
from llm_jax.data.formats import read_examples
from llm_jax.data.tokenizers import load_tokenizer
from llm_jax.inference.config import SamplingParams
from llm_jax.inference.generator import Completion
from llm_jax.jobs import graph
from llm_jax.jobs.alignment.making import ChunkStore, Made, make_pairs, prompt_seed, summed
from llm_jax.jobs.alignment.methods import pair_maker
from llm_jax.jobs.alignment.policies import Policies
from llm_jax.jobs.alignment.prompts import Prompt, read_prompts, share_of, training_prompts
from llm_jax.jobs.alignment.sampler import Journal, encode
from llm_jax.jobs.alignment.scorers import answer_scores, open_scorer
from llm_jax.jobs.config import PairsConfig, RoundsConfig, ScorerConfig
from llm_jax.models.loading import load
from llm_jax.storage.checkpoints import Checkpoints
from llm_jax.storage.workdir import Workdir
from tests.jobs.alignment.conftest import CONFIG as CONFIG_FILE
from tests.jobs.alignment.conftest import overrides
from tests.jobs.conftest import CONFIGS


def lines(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def round_of(node, number):
    return node.workdir.path / "rounds" / f"{number:02d}"


class Fixed:
    """A sampler that says what it was given, and counts."""

    def __init__(self, texts, reason="stop"):
        self.texts, self.reason, self.calls = texts, reason, []

    def generate(self, prompts, params):
        self.calls.append((prompts, params))
        return [
            Completion(i, n, [1, 2], text, self.reason, [-0.5, -0.25])
            for i in range(len(prompts))
            for n, text in enumerate(self.texts)
        ]


def test_a_line_per_round_and_a_report(rounds):
    found = lines(rounds.workdir.metrics)
    assert [line["step"] for line in found] == [0, 1, 2]
    assert found[0].keys() == {k for k in found[1] if k.startswith("eval_exact") or k in EVALUATED}
    for line in found[1:]:
        assert line["pairs/samples"] == 12 and line["pairs/tokens"] <= 12 * 8
        assert 0 < line["reward"] < 1 and line["rewards/accuracies"] in (0.0, 0.5, 1.0) and "loss" in line
    shown = lines(rounds.workdir.samples)
    assert len(shown) == 2 and shown[0].keys() == {"prompt", "answer", "before", "after"}
    page = rounds.workdir.report.read_text()
    assert "eval_exact_match" in page and "rewards/margins" in page


EVALUATED = ("step", "eval_length", "eval_truncated", "eval_careful")


def test_each_round_begins_where_the_one_before_ended(rounds):
    records = [Workdir(round_of(rounds, n) / "run").read_config() for n in (1, 2)]
    assert records[0]["parents"]["init_from"]["path"] == str(rounds.parents["init_from"])
    assert records[1]["parents"]["init_from"] == {
        "path": str(round_of(rounds, 1) / "run"),
        "hash": records[0]["hash"],
    }
    assert all(record["config"]["reference"] is None for record in records)
    prompts = [{json.dumps(line["prompt"]) for line in lines(round_of(rounds, n) / "pairs.jsonl")} for n in (1, 2)]
    assert len(prompts[0]) == len(prompts[1]) == 4 and not prompts[0] & prompts[1]


def test_the_run_is_a_model_of_its_own(rounds):
    last = Checkpoints(round_of(rounds, 2) / "run" / "checkpoints")
    own, exported = load(rounds.workdir.path), load(rounds.workdir.export)
    trained = flatten(last.restore_numpy(rounds.config.preference.train.steps)["params"]["policy"])
    for name, array in flatten(own.params).items():
        np.testing.assert_array_equal(array, trained[name])
        np.testing.assert_array_equal(array, flatten(exported.params)[name])


def test_a_maker_is_a_function_of_its_arguments(rounds):
    """Made again from the same weights: the same bits; with other seeds other samples."""
    config = rounds.config
    tokenizer = load_tokenizer(rounds.workdir.tokenizer)
    sampler = Policies(rounds, tokenizer).of(rounds.parents["init_from"])
    chunk = share_of(training_prompts(config), 1, 4, 2)[:2]
    seed = prompt_seed(config.seed, 1, "round")
    with open_scorer(config.scorer, None) as scorer:
        maker = pair_maker(config, tokenizer, scorer)
        stored = ChunkStore(round_of(rounds, 1)).read(0)
        assert stored is not None and maker(chunk, sampler, seed) == stored
        assert maker(chunk, sampler, seed + 1).records != stored.records


def test_what_was_drawn_is_not_drawn_again(tmp_path):
    file = tmp_path / "journal.jsonl"
    first = Fixed(["a", "b"])
    params = [SamplingParams(n=2, seed=3)]
    drawn = [Journal(first, file).generate([[5, 6]], params)]
    journal, second = Journal(Fixed([]), file), Fixed(["c"])
    assert journal.generate([[5, 6]], params) == drawn[0]
    journal = Journal(second, file)
    journal.generate([[5, 6]], params)
    assert [one.text for one in journal.generate([[7]], params)] == ["c"] and len(second.calls) == 1
    with file.open("ab") as f:
        f.write(b'{"request": "cut sho')
    journal = Journal(Fixed([]), file)
    assert [journal.generate(ids, params)[0].text for ids in ([[5, 6]], [[7]])] == ["a", "c"]
    with pytest.raises(UserError, match="journal.jsonl:1 answers another request"):
        Journal(Fixed([]), file).generate([[5, 7]], params)


def test_a_chunk_is_made_once_and_no_sampler_opened_for_nothing(tmp_path):
    store, prompts = ChunkStore(tmp_path), [Prompt(i, f"f:{i}", "q") for i in range(5)]
    made = []

    def maker(chunk, sampler, seed):
        made.append([prompt.number for prompt in chunk])
        if chunk[0].number == 2 and len(made) < 3:
            raise KeyboardInterrupt
        return Made([{"prompt": "q", "n": p.number} for p in chunk], {"samples": len(chunk)})

    def opened():
        return Fixed(["x"])

    with pytest.raises(KeyboardInterrupt):
        make_pairs(store, prompts, 2, maker, opened, 0)
    assert not store.pairs.exists()
    make_pairs(store, prompts, 2, maker, opened, 0, earlier=[{"prompt": "before"}])
    assert made == [[0, 1], [2, 3], [2, 3], [4]]
    assert [line.get("n") for line in lines(store.pairs)] == [None, 0, 1, 2, 3, 4]
    assert summed(store.all()) == {"pairs": 5, "samples": 5}
    store.pairs.unlink()
    make_pairs(store, prompts, 2, maker, lambda: pytest.fail("opened"), 0)
    assert len(made) == 4


CONFIG = RoundsConfig(sampling=SamplingParams(n=4))


def of_method(chain, texts, reason="stop", answer="7", **fields):
    """The records of one prompt under a method, and the counts."""
    tokenizer = load_tokenizer(chain["sft"].workdir.tokenizer)
    config = replace(CONFIG, **fields)
    prompt = Prompt(0, "f:1", ({"role": "user", "content": "3 + 4?"},), answer, "It is 7. Answer: 7")
    made = pair_maker(config, tokenizer, answer_scores)([prompt], Fixed(texts, reason), 0)
    said = [(r["chosen"][0]["content"], r["rejected"][0]["content"]) for r in made.records]
    return said, made


TEXTS = ["Answer: 7", "Answer: 8", "So Answer: 7", "no"]


def test_the_methods_pairs_and_columns(chain):
    said, made = of_method(chain, TEXTS)
    assert said == [("Answer: 7", "Answer: 8")]
    assert made.records[0]["chosen_score"] == 1 and made.records[0]["rejected_score"] == 0
    assert made.counts["samples"] == made.counts["scored"] == 4 and made.counts["score_sum"] == 2

    thresholds = PairsConfig(choose="thresholds", above=1.0, below=0.0)
    said, _ = of_method(chain, TEXTS, method="iterative_rpo", pairs=thresholds)
    assert said == [(c, r) for c in (TEXTS[0], TEXTS[2]) for r in (TEXTS[1], TEXTS[3])]

    compare = ScorerConfig(win_probability="compare")
    said, made = of_method(chain, TEXTS, method="spo", scorer=compare)
    # A right one beats two of the three others and ties with one: (1 + 1 + 1/2) / 3; a wrong one is its mirror.
    assert said == [("Answer: 7", "Answer: 8")]
    record = made.records[0]
    assert record["chosen_score"] == pytest.approx(5 / 6) and record["rejected_score"] == pytest.approx(1 / 6)
    assert record["weight"] == pytest.approx(4 / 6)

    said, made = of_method(chain, TEXTS, method="sppo")
    win = 1 / (1 + np.exp(-1.0))
    record = made.records[0]
    assert record["chosen_score"] == pytest.approx((win * 2 + 1) / 4)
    assert record["rejected_score"] == pytest.approx(((1 - win) * 2 + 1) / 4) and "weight" not in record

    said, made = of_method(chain, ["Answer: 8", "It is 7. Answer: 7"], method="spin")
    assert said == [("It is 7. Answer: 7", "Answer: 8")] and made.counts["equal_answers"] == 1


def test_ties_empty_and_cut_off_answers_are_counted_and_left_out(chain):
    said, made = of_method(chain, ["Answer: 8", "Answer: 9", "x", "y"])
    assert not said and made.counts["ties"] == 1
    said, made = of_method(chain, ["Answer: 7", " ", "", "Answer: 8"])
    assert len(said) == 1 and made.counts["empty"] == 2
    said, made = of_method(chain, TEXTS, reason="length")
    assert not said and made.counts["truncated"] == 4 and made.counts["too_few"] == 1
    said, made = of_method(chain, TEXTS, reason="length", pairs=PairsConfig(truncated="keep"))
    assert len(said) == 1


def test_samples_are_continued_where_training_sees_the_answer_begin(chain):
    tokenizer = load_tokenizer(chain["sft"].workdir.tokenizer)
    asked = ({"role": "user", "content": "How many?"},)
    for content, answer in ((asked, ({"role": "assistant", "content": "3 - 2 = 1"},)), ("How many? ", "3 - 2 = 1")):
        (encoded,) = encode_examples("preference", [("f:1", Pair(content, answer, answer))], tokenizer)
        prompt = Prompt(0, "f:1", content)
        begun = encoded.sequences[0].ids.tolist()
        assert encode(tokenizer, prompt) == begun[: encoded.prompt_length]
        assert encode(tokenizer, prompt, "3 - 2 = 1") == begun[: len(encode(tokenizer, prompt, "3 - 2 = 1"))]


def test_rounds_take_their_prompts_in_turn():
    prompts = [Prompt(i, f"f:{i}", "q") for i in range(10)]

    def numbers(*arguments):
        return [prompt.number for prompt in share_of(prompts, *arguments)]

    assert [numbers(r, None, 3) for r in (1, 2, 3)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8, 9]]
    assert numbers(3, 4, 3) == [8, 9, 0, 1] and numbers(1, 99, 3) == list(range(10))
    assert len({prompt_seed(0, n, p) for n in range(100) for p in ("", "pairs")}) == 200


GSM8K = {"question": "How many?", "answer": "6*2 = <<6*2=12>>12.\n#### 1,200"}


def test_prompts_of_files(tmp_path):
    records = [
        GSM8K,
        {"prompt": "2 + 2 =", "answer": 4, "level": "easy"},
        {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (tmp_path / "b.jsonl").write_text(json.dumps(GSM8K) + "\n")
    data = DataConfig(path=str(tmp_path / "a.jsonl"), eval_path=str(tmp_path / "b.jsonl"))
    one, two, three, four = read_prompts(data, "train")
    assert one.content == ({"role": "user", "content": "How many?"},)
    assert (one.answer, one.written) == ("1,200", GSM8K["answer"])
    # To the letter what SFT learns from the same record.
    (learned,) = read_examples("sft", GSM8K, "here")
    assert isinstance(learned, examples.Completion)
    assert (learned.prompt, learned.completion) == (one.content, ({"role": "assistant", "content": one.written},))
    assert (two.content, two.answer, two.written, two.columns["level"]) == ("2 + 2 =", "4", None, "easy")
    assert three.written == four.written == "b" and three.content == four.content
    assert [prompt.number for prompt in (one, two, three, four)] == [0, 1, 2, 3]
    (held,) = read_prompts(data, "eval")
    assert held.where.endswith("b.jsonl:1")
    assert len(read_prompts(data, "train", 2)) == 2
    for bad, said in (
        ({"prompt": "x", "answer": ""}, "`answer` has to be a string, and not empty"),
        ({"text": "x"}, "a prompt needs `prompt`"),
        ({"messages": [{"role": "user", "content": "a"}]}, "`messages` has to end in a turn of the assistant's"),
        ({"prompt": [{"role": "assistant", "content": "a"}]}, "ends in a turn of the assistant's"),
        ({"prompt": "x", "system": "be good"}, "`system` is not read here"),
    ):
        (tmp_path / "b.jsonl").write_text(json.dumps(bad) + "\n")
        with pytest.raises(UserError, match="b.jsonl:1: ") as error:
            read_prompts(data, "eval")
        assert said in str(error.value)


def test_the_hash_covers_the_prompts_and_the_scoring_function(rounds, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "judged.py").write_text("def f(prompts, completions, **c):\n    return [0.0] * len(prompts)\n")

    def digest(**fields):
        given = {"init_from": str(rounds.parents["init_from"]), "scorer.function": "judged.f"} | fields
        return graph.resolve(CONFIG_FILE, list(given.items())).hash

    before = digest()
    assert digest(**{"mesh.data": "2"}) == before != digest(seed="1")
    assert digest(**{"data.generated.max_number": "9"}) != before
    (tmp_path / "judged.py").write_text("def f(prompts, completions, **c):\n    return [1.0] * len(prompts)\n")
    assert digest() != before


OTHERS = ("iterative_dpo.py:rpo_test", "spo.py:test", "sppo.py:test", "spin.py:test")


@pytest.mark.parametrize("config", OTHERS)
def test_the_other_configs_are_accepted(config, chain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    node = graph.prepare(str(CONFIGS / config), overrides(chain))
    assert node.workdir.tokenizer.exists() and not node.workdir.checkpoints.exists()


@pytest.mark.slow
@pytest.mark.parametrize("config", OTHERS)
def test_the_other_configs_run(config, chain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    node = graph.run(str(CONFIGS / config), overrides(chain))
    found = lines(node.workdir.metrics)
    assert [line["step"] for line in found] == [0, 1, 2] and all(np.isfinite(line["loss"]) for line in found[1:])
    # SPIN trains on the pairs of the round before too.
    second = len(lines(round_of(node, 2) / "pairs.jsonl"))
    assert second == found[2]["pairs/pairs"] + (found[1]["pairs/pairs"] if config.startswith("spin") else 0)
