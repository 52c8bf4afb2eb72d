"""Step-DPO's and MCTS-DPO's pairs from policies whose answers are known."""

import json
from dataclasses import asdict, replace

import pytest
from etils import epath

from llm_jax.base.errors import UserError
from llm_jax.data.embedded.problems import Problem
from llm_jax.data.encode import encode_examples
from llm_jax.data.formats import read_examples
from llm_jax.data.stepwise import StepPair
from llm_jax.inference.config import SamplingParams
from llm_jax.jobs.alignment.prompts import Prompt
from llm_jax.jobs.alignment.sampler import Journal
from llm_jax.jobs.alignment.scorers import answer_scores
from llm_jax.jobs.alignment.step_checks import check_steps
from llm_jax.jobs.alignment.stepwise import StepPairs
from llm_jax.jobs.alignment.tree_search import TreePairs
from llm_jax.jobs.config import PairsConfig, PreferenceConfig, RoundsConfig, ScorerConfig, StepsConfig, TreeConfig
from tests.jobs.alignment.scripted import Scripted, small_tokenizer

BEN = Problem("Ben", "pencil", 13, (("-", 2), ("+", 5)), ("Ben has 13 pencils.", "", ""), "How many?")
ASKED = ({"role": "user", "content": "How many?"},)
PROMPT = Prompt(0, "problem 0", ASKED, "16", BEN.careful, BEN)
RIGHT = "13 - 2 = 11. 11 + 5 = 16. Answer: 16"
GSM = Prompt(7, "f:8", ASKED, "18", columns={})


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


def config(**fields) -> RoundsConfig:
    return RoundsConfig(**{"method": "step_dpo", "sampling": SamplingParams(n=2, max_tokens=60), **fields})


def made(tokenizer, replies, prompts=(PROMPT,), **fields):
    """`replies`: by the answer so far, what each sample goes on with."""
    sampler = Scripted(tokenizer, lambda so_far, sample: replies[so_far][sample])
    return StepPairs(config(**fields), tokenizer, None)(prompts, sampler, 3), sampler


def record(prefix, chosen, rejected, ends, **columns):
    sides = {"chosen": chosen, "rejected": rejected, "chosen_ends": ends[0], "rejected_ends": ends[1]}
    return {"prompt": [dict(ASKED[0])], "prefix": prefix, **sides, **columns}


def test_the_first_wrong_step_is_replaced(tokenizer):
    replies = {
        "": ["13 - 2 = 11. 11 + 5 = 17. Answer: 17", RIGHT],
        "13 - 2 = 11.": [" 11 - 5 = 6. Answer: 6", " 11 + 5 = 16. Answer: 16"],
    }
    found, sampler = made(tokenizer, replies)
    assert found.records == [record("13 - 2 = 11.", " 11 + 5 = 16.", " 11 + 5 = 17.", (False, False))]
    assert sampler.calls == [1, 1] and len(set(sampler.seeds)) == 2
    assert found.counts["samples"] == 4 and found.counts["right"] == 1


def test_last_steps_end_their_answers(tokenizer):
    replies = {
        "": ["13 - 2 = 11. 11 + 5 = 16. Answer: 15", RIGHT],
        "13 - 2 = 11. 11 + 5 = 16.": [" Answer: 16"] * 2,
    }
    (found,) = made(tokenizer, replies)[0].records
    assert found == record("13 - 2 = 11. 11 + 5 = 16.", " Answer: 16", " Answer: 15", (True, True))
    # As rows: an end token behind these, and none behind a step before the last.
    (pair,) = read_examples("preference", found, "f:1")
    (encoded,) = encode_examples("preference", [("f:1", pair)], tokenizer)
    shown = [tokenizer.decode(s.ids[s.mask == 1].tolist()) for s in encoded.sequences]
    assert shown == [" Answer: 16<|im_end|>", " Answer: 15<|im_end|>"]


def test_what_makes_no_pair_is_counted(tokenizer):
    guess = "It must be 3. Answer: 3"
    replies = {"": [guess, "13 - 2 = 11. 11 + 5 = 16."]}  # a wrong step, and an answer without a result
    replies["13 - 2 = 11. 11 + 5 = 16."] = [" Answer: 1", " Answer: 2"]
    found, _ = made(tokenizer, {**replies, "": [guess, RIGHT.rpartition(" Answer")[0]]})
    assert found.records == []
    assert (found.counts["not_located"], found.counts["not_corrected"]) == (1, 1)
    cut, _ = made(tokenizer, {"": ["13 - 2 = 12. 12 + 5 = 17. Answer: 17"] * 2}, sampling=SamplingParams(max_tokens=4))
    assert cut.records == [] and cut.counts["truncated"] == 1


def test_answers_that_go_wrong_alike_are_one(tokenizer):
    replies = {
        "": ["13 - 2 = 12. 12 + 5 = 17. Answer: 17", "13 - 2 = 12. Answer: 12", "13 - 2 = 10. Answer: 10"],
        # Samples of the start again, for the corrections.
    }
    sampler = Scripted(tokenizer, lambda so_far, sample: replies[""][sample] if len(sampler.calls) == 1 else RIGHT)
    sampling = SamplingParams(n=3, max_tokens=60)
    found = StepPairs(config(sampling=sampling), tokenizer, None)([PROMPT], sampler, 0)
    assert [r["rejected"] for r in found.records] == ["13 - 2 = 12.", "13 - 2 = 10."]
    one = StepPairs(config(sampling=sampling, steps=StepsConfig(most=1)), tokenizer, None)
    sampler.calls.clear()
    assert len(one([PROMPT], sampler, 0).records) == 1


def test_marks_and_continuations_locate_steps_of_gsm8k(tokenizer):
    """A false mark is located by itself; a true one that leads nowhere only by going on from every step."""
    right = ["9*2 = <<9*2=18>>18\n", "#### 18"]
    false, senseless = "9*2 = <<9*2=19>>19\n#### 19", "9+2 = <<9+2=11>>11\n#### 11"
    replies = {"": [false, senseless]}

    def reply(so_far, sample):
        if len(sampler.calls) == 1:
            return replies[""][sample]
        return "".join(right) if so_far == "" else "#### 3"

    sampler = Scripted(tokenizer, reply)
    by_marks = StepPairs(config(), tokenizer, None)([GSM], sampler, 0)
    assert [(r["prefix"], r["chosen"], r["rejected"]) for r in by_marks.records] == [("", right[0], false[:19])]
    assert by_marks.counts["not_located"] == 1
    sampler.calls.clear()
    found = StepPairs(config(steps=StepsConfig("continuations")), tokenizer, None)([GSM], sampler, 0)
    assert [r["rejected"] for r in found.records] == [false[:19], senseless[:19]]
    assert sampler.calls == [1, 4]  # once, and behind none and one of two steps of each


def tree_config(**fields) -> RoundsConfig:
    tree = {"simulations": 6, "separator": ".", "depth": 4} | fields.pop("tree", {})
    base = {"method": "mcts_dpo", "sampling": SamplingParams(n=2, max_tokens=40), "tree": TreeConfig(**tree)}
    return RoundsConfig(**{**base, **fields})


TREE = {
    "": ["13 - 2 = 11.", "13 - 2 = 12."],
    "13 - 2 = 11.": [" 11 + 5 = 16.", " 11 - 5 = 6."],
    "13 - 2 = 12.": [" 12 + 5 = 17.", " 12 + 5 = 17."],
    "13 - 2 = 11. 11 + 5 = 16.": [" Answer: 16", " Answer: 15"],
    "13 - 2 = 11. 11 - 5 = 6.": [" Answer: 6", " Answer: 7"],
    "13 - 2 = 12. 12 + 5 = 17.": [" Answer: 17", " Answer: 18"],
}


def searched(tokenizer, prompts=(PROMPT,), **fields):
    sampler = Scripted(tokenizer, lambda so_far, sample: TREE[so_far][sample])
    return TreePairs(tree_config(**fields), tokenizer, answer_scores)(prompts, sampler, 5), sampler


def test_trees_make_pairs_per_depth(tokenizer):
    made, sampler = searched(tokenizer, tree={"simulations": 20, "exploration": 3.0})
    (note,) = made.notes
    root = note["tree"]
    assert note["prompt"] == "How many?" and note["answer"] == "16" and root["N"] == 20
    assert [child["text"] for child in root["children"]] == TREE[""]
    first, second = made.records[0], made.records[-1]
    q = {child["text"]: child["Q"] for child in root["children"]}
    n = {child["text"]: child["N"] for child in root["children"]}
    assert q["13 - 2 = 11."] > q["13 - 2 = 12."]
    smoothing = n["13 - 2 = 12."] / sum(n.values())
    better, worse = TREE[""]
    assert first == record(
        "",
        better,
        worse,
        (False, False),
        chosen_score=q["13 - 2 = 11."],
        rejected_score=q["13 - 2 = 12."],
        label_smoothing=pytest.approx(smoothing),
    )
    assert second["prefix"] == "13 - 2 = 11. 11 + 5 = 16."
    assert (second["chosen"], second["rejected"]) == (" Answer: 16", " Answer: 15")
    assert second["chosen_ends"] and second["rejected_ends"]
    assert (second["chosen_score"], second["rejected_score"]) == (1.0, -1.0)
    assert json.loads(json.dumps(asdict(made))) == asdict(made)
    # Written in a data set they are read as they were meant.
    for one in made.records:
        (pair,) = read_examples("preference", one, "f:1")
        assert isinstance(pair, StepPair) and pair.numbers["label_smoothing"] == one["label_smoothing"]


def test_many_trees_take_as_many_calls_as_one(tokenizer):
    """A call expands a node of every tree, so that 8 prompts cost no more calls than one; and each tree is its own."""
    alone, one = searched(tokenizer)
    prompts = [replace(PROMPT, number=number) for number in range(8)]
    together, many = searched(tokenizer, prompts)
    assert len(many.calls) == len(one.calls) and many.calls[0] == 8
    assert together.notes == alone.notes * 8 and together.records == alone.records * 8
    assert len(set(many.seeds)) == len(many.seeds)


@pytest.mark.parametrize("killed", range(4))
@pytest.mark.parametrize("method", ["step_dpo", "mcts_dpo"])
def test_a_search_goes_on_where_it_was_killed(tokenizer, tmp_path, method, killed):
    """What was drawn before is read back, call by call, and the rest is what it would have been."""
    prompts = [replace(PROMPT, number=number) for number in range(3)]
    wrong = {"": ["13 - 2 = 12. Answer: 12", "13 - 2 = 11. 11 + 5 = 17. Answer: 17"]}
    wrong["13 - 2 = 11."] = [" 11 + 5 = 16. Answer: 16"] * 2
    replies = TREE if method == "mcts_dpo" else wrong

    def maker():
        if method == "mcts_dpo":
            return TreePairs(tree_config(), tokenizer, answer_scores)
        return StepPairs(config(), tokenizer, None)

    whole_sampler = Scripted(tokenizer, lambda so_far, sample: replies[so_far][sample])
    whole = maker()(prompts, whole_sampler, 5)

    class Killed(Exception):
        pass

    class Dying(Scripted):
        def generate(self, prompts, params):
            if len(self.calls) == killed:
                raise Killed
            return super().generate(prompts, params)

    file = epath.Path(tmp_path / "journal.jsonl")
    dying, living = (kind(tokenizer, whole_sampler.reply) for kind in (Dying, Scripted))
    journal = Journal(dying, file)
    if killed < len(whole_sampler.calls):
        with pytest.raises(Killed):
            maker()(prompts, journal, 5)
    else:
        maker()(prompts, journal, 5)
    journal.close()
    assert maker()(prompts, Journal(living, file), 5) == whole
    assert dying.calls + living.calls == whole_sampler.calls


def test_depth_and_room_end_a_tree(tokenizer):
    """The last step is drawn to the answer's end, and one that fills a row is the last."""
    made, _ = searched(tokenizer, tree={"depth": 1})
    assert all(child["terminal"] for child in made.notes[0]["tree"]["children"])
    base = tree_config()
    sampler = Scripted(tokenizer, lambda so_far, sample: TREE[so_far][sample])
    small = replace(base, data=replace(base.data, window=8))
    found = TreePairs(small, tokenizer, answer_scores)([PROMPT], sampler, 0)
    assert sampler.calls == [1]
    assert all(child["terminal"] for child in found.notes[0]["tree"]["children"])


def test_what_the_policy_thinks_of_its_steps(tokenizer):
    """`self`: a node is worth the policy's opinion of its steps; `both`: that and the outcome of a whole answer."""
    texts = []

    class Asked(Scripted):
        def _completion(self, prompt, sample, ids, params):
            done = super()._completion(prompt, sample, ids, params)
            if params.logprobs:
                texts.append(self.tokenizer.decode(ids))
                assert (params.max_tokens, params.temperature) == (1, 0.0)
            return done

    def reply(so_far, sample):
        return TREE.get(so_far, ["yes"] * 2)[sample]

    for value, depth, expected in (("self", 4, {0.25}), ("both", 1, {0.25 - 1})):
        sampler = Asked(tokenizer, reply)
        maker = TreePairs(tree_config(tree={"value": value, "depth": depth}), tokenizer, answer_scores)
        maker._yes = lambda done: 0.25
        made = maker([PROMPT], sampler, 0)
        assert {child["value"] for child in made.notes[0]["tree"]["children"]} == expected
    assert texts[0].endswith(
        "<|im_start|>assistant\n13 - 2 = 11.<|im_end|>\n"
        "<|im_start|>user\nAre all of these steps right? Answer with yes or no.<|im_end|>\n<|im_start|>assistant\n"
    )


def test_an_opinion_is_yes_against_no(tokenizer):
    maker = TreePairs(tree_config(tree={"value": "self"}), tokenizer, answer_scores)
    words = {5: "Yes", 6: " no", 7: "may", 8: "yes"}

    class Words:
        def decode(self, ids):
            return words[ids[0]]

    maker.tokenizer = Words()  # pyright: ignore[reportAttributeAccessIssue]
    done = Scripted(tokenizer, lambda *_: "x").generate([[1]], SamplingParams(logprobs=1))[0]
    likely = replace(done, top_logprobs=[[(5, -1.0), (6, -2.0), (7, -0.1), (8, -3.0)]])
    e1, e2, e3 = 0.36787944, 0.13533528, 0.04978707
    assert maker._yes(likely) == pytest.approx((e1 + e3) / (e1 + e2 + e3))
    assert maker._yes(replace(done, top_logprobs=[[(7, -0.1)]])) == 0


BAD = [
    (config(tree=TreeConfig(simulations=3)), "tree.simulations=3 is not read by method=step_dpo"),
    (config(steps=StepsConfig(most=0)), "steps.most is 0; it must be at least 1"),
    (config(sampling=SamplingParams(stop=("x",))), "sampling.stop=.* answers end by themselves"),
    (config(pairs=PairsConfig(truncated="keep")), "pairs.truncated=keep is not read by method=step_dpo"),
    (tree_config(steps=StepsConfig(most=1)), "steps.most=1 is not read by method=mcts_dpo"),
    (tree_config(tree={"simulations": 0}), "tree.simulations is 0"),
    (tree_config(tree={"exploration": -1.0}), "tree.exploration is -1.0"),
    (tree_config(tree={"discount": 0.0}), "tree.discount is 0.0"),
    (tree_config(tree={"separator": ""}), "tree.separator is empty"),
    (tree_config(tree={"question": "Well?"}), "tree.question='Well\\?' is not read by tree.value=outcome"),
    (tree_config(scorer=ScorerConfig("function", pairwise=True)), "scorer.pairwise=True compares two answers"),
    (tree_config(preference=PreferenceConfig(loss_type="ipo")), "which preference.loss_type=ipo does not read"),
]


@pytest.mark.parametrize(("given", "message"), BAD)
def test_bad_fields(given, message):
    with pytest.raises(UserError, match=message):
        check_steps(given)
