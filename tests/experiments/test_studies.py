"""The studies: each command at test size, and how they put numbers together."""

import importlib
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

STUDIES = Path(__file__).parents[2] / "experiments" / "studies"


@pytest.fixture
def study(monkeypatch):
    """A module of the folder, by name."""
    monkeypatch.syspath_prepend(STUDIES)
    return importlib.import_module


def test_arms_differ_where_the_ranges_of_their_seeds_are_apart(study):
    common = study("common")
    assert common.compared([1.0, 1.2, 1.1], [1.3, 1.4, 1.25]) == "lower"
    assert common.compared([1.3, 1.4, 1.25], [1.0, 1.2, 1.1]) == "higher"
    assert common.compared([1.0, 1.3, 1.1], [1.25, 1.4, 1.5]) == "no difference"
    assert common.changed([0.3, 0.4, 0.5]) == "higher" and common.changed([-0.3, -0.4, -0.5]) == "lower"
    assert common.changed([0.1, 0.2, 0.4]) == "no difference"
    assert common.cell([1.0, 1.3, 1.15], 2) == "1.15 (1.00–1.30)"
    assert common.table(["a", "b"], [[1, "x"]]) == "| a | b |\n| --- | --- |\n| 1 | x |"


def test_rows_hold_real_documents_in_order(study):
    common = study("common")
    read = common.text(300, 50_000)
    rows = common.packed_rows(read.tokenizer, read.train, 64)
    line = np.concatenate(read.train)
    assert np.array_equal(rows["tokens"].ravel(), line[: rows["tokens"].size])
    first = rows["segment_ids"] != np.pad(rows["segment_ids"], ((0, 0), (1, 0)))[:, :-1]
    assert np.array_equal(rows["loss_mask"] == 0, first) and np.all(rows["positions"][first] == 0)
    assert not set(map(tuple, read.train)) & set(map(tuple, read.held_out))


def test_the_time_to_a_loss_lies_between_two_looks(study):
    experts, look = study("experts"), study("common").Look
    curve = [look(10, 1.0, 5.0), look(20, 3.0, 4.0), look(30, 4.0, 3.5)]
    assert experts.reached(curve, 4.25) == look(17.5, 2.5, 4.25)
    assert experts.reached(curve, 3.0) is None


def test_exponents_and_crossings_of_power_laws(study):
    space = study("state_space")
    lengths = [512 << i for i in range(6)]
    square, straight = {n: 1e-6 * n**2 for n in lengths}, {n: 4e-3 * n for n in lengths}
    assert abs(space.exponent(square) - 2) < 1e-9 and abs(space.exponent(straight) - 1) < 1e-9
    assert space.crossing(straight, square) == "4000"
    assert space.crossing(square, straight) == "beyond 16384"


def test_traffic_of_attention_is_that_of_the_closed_forms(study):
    traffic = study("attention_traffic")
    T, d, b = 2048, 64, 128
    full, causal = (traffic.call(T, d, causal) for causal in (False, True))
    own, keys = T * (4 * d + 4), T * 4 * d
    assert traffic.flash_bytes(full, b, b) == own + T // b * keys
    assert traffic.flash_bytes(causal, b, b) == own + (T // b + 1) / 2 * keys
    assert traffic.backward_bytes(full, b) == T * (6 * d + 8) + T * 8 * d + T // b * (keys + T * (4 * d + 8))
    assert traffic.cached_bytes(full, heads=2) == own + keys  # a head's keys stay in the cache: each is read once
    assert traffic.cached_bytes(full, cache=keys // 2, at_once=4, heads=2) == own + T // b // 4 * keys
    for _, law, counted in traffic.laws(4096):
        assert abs(float(law) - float(counted)) < 0.06


def test_intervals_of_arms_on_the_same_problems(study):
    loops = study("loops")
    chance = np.random.default_rng(0)
    theirs = chance.uniform(size=(3, 1000)) < 0.4
    # Right where the other is, and on one in ten of the others: paired, the problems' own spread drops out.
    gained = chance.uniform(size=(3, 1000)) < 0.1
    ours = theirs | gained
    middle, low, high = loops.paired_interval(ours, theirs)
    share = (ours.mean(axis=0) - theirs.mean(axis=0)).std() / 1000**0.5
    assert middle == pytest.approx(ours.mean() - theirs.mean())
    assert low == pytest.approx(middle - 1.96 * share, abs=0.1 * share)
    assert high == pytest.approx(middle + 1.96 * share, abs=0.1 * share)
    assert loops.difference(ours, theirs).endswith("above") and loops.difference(theirs, ours).endswith("below")
    assert loops.difference(ours[:1], ours[:1]).endswith("no difference")


@pytest.mark.slow
def test_a_model_says_of_all_answers_what_it_says_of_each(study):
    known = study("known_reward")
    world = known.make_world(0, 10, 2)
    tokens = np.concatenate([np.repeat(world.held_out[1:], len(known.ANSWERS), axis=0), known.ANSWERS], axis=1)
    each = known.answer_logps(known.bind(known.DECODER(), world.params), tokens, known.LENGTHS)
    np.testing.assert_allclose(world.held_out_logps[1], each, rtol=1e-5)
    np.testing.assert_allclose(np.exp(world.held_out_logps).sum(axis=1), 1, rtol=1e-5)


def test_optima_of_known_rewards(study):
    """IPO's is the least loss of all pairs, and no policy has more reward than the reward's own at its KL."""
    known, frontiers = study("known_reward"), study("frontiers")
    chance = np.random.default_rng(0)
    reference, values = np.log(chance.dirichlet(np.ones(6)))[None], chance.integers(3, size=(1, 6)) * 1.0
    shares = known.win_rates(reference, values, certain=True)
    logits = (known.tilted(reference, shares, 0.7) - reference)[0]
    # Its gradient, of pairs drawn from the reference and judged by the larger reward, at tau = 0.7.
    gaps, sign = logits[:, None] - logits, np.sign(values[0][:, None] - values[0])
    slope = (np.exp(reference[0]) * 2 * (gaps - sign / (2 * 0.7)) * (sign != 0)).sum(axis=1)
    np.testing.assert_allclose(slope, 0, atol=1e-12)
    best = [known.point(known.tilted(reference, values, s), reference, values) for s in known.OPTIMA]
    other = known.point(np.log(chance.dirichlet(np.ones(6)))[None], reference, values)
    assert frontiers.attained(best, other.kl) > other.reward
    points = [known.Point(0.0, 0.0), known.Point(1.0, 2.0), known.Point(2.0, 2.5), known.Point(1.5, 1.0)]
    assert frontiers.attained(points, 0.5) == 1 and frontiers.attained(points, 9) == 2.5


def test_bandits_end_where_the_losses_are_least(study):
    """IPO's policy of a before b before c is softmax(1/3, 0, -1/3) at tau = 1, DPO's gives a alone."""
    deterministic = study("deterministic")
    probs = np.exp([1 / 3, 0, -1 / 3]) / np.exp([1 / 3, 0, -1 / 3]).sum()
    wanted = float((probs * np.log(3 * probs)).sum())
    assert deterministic.ipo_limit(1.0, deterministic.ORDER) == pytest.approx(wanted)
    assert deterministic.bandit("IPO", 1.0, deterministic.ORDER, (2000,)) == pytest.approx([wanted], rel=1e-2)
    assert deterministic.bandit("DPO", 1.0, deterministic.ORDER, (20_000,)) == pytest.approx([np.log(3)], rel=1e-2)


@pytest.mark.slow
def test_log_probabilities_around_the_digit_are_parts_of_the_answers(study):
    """Both answers' are alike before it, and the three parts add up to what the losses are given."""
    fall, policies, config = study("both_fall"), study("small_policies"), study("both_fall").EmbeddedConfig()
    size = policies.Size(width=32, layers=1, demonstrations=500, steps=4)
    ground = policies.Ground(config, lambda problem, chance: problem.careful, size)
    whole, steps = zip(*fall.digit_pairs(policies.problems(config, "pairs", 12)), strict=True)
    for pair, step in zip(whole, steps, strict=True):
        assert sum(a != b for a, b in zip(pair.chosen, pair.rejected, strict=True)) == 1
        assert pair.chosen.startswith(step.prefix + step.chosen)
        assert pair.rejected.startswith(step.prefix + step.rejected)
    params, rows = ground.start(0), ground.pairs(whole)
    parts, sums = fall.by_place(ground, params, rows), ground.logps(params, rows)
    np.testing.assert_allclose(parts["chosen"][:, 0], parts["rejected"][:, 0], rtol=1e-5)
    for name, each in parts.items():
        np.testing.assert_allclose(each.sum(axis=1), sums[f"{name}_logps"][:, 0], rtol=1e-5)


def test_unused_slots_of_pages_and_pieces(study):
    waste = study("page_waste")
    trace = waste.Trace(np.array([5, 30]), np.array([3, 4]))
    lengths = [6, 7, 8, 31, 32, 33, 34]
    held = sum(-(-length // 16) * 16 for length in lengths)
    assert waste.used(trace) == sum(lengths)
    assert waste.waste_of_pages(trace, 16) == pytest.approx(1 - sum(lengths) / held)
    assert waste.waste_of_pieces(trace, 64) == pytest.approx(1 - sum(lengths) / (7 * 64))
    drawn = waste.trace("Alpaca", 1.0, 20_000, seed=0)
    assert drawn.prompts.mean() == pytest.approx(19, rel=0.05) and drawn.outputs.mean() == pytest.approx(58, rel=0.05)


COMMANDS = {
    "experts": ["--steps", "4", "--parts", "dense"],
    "blocks": ["--steps", "4", "--rates", "4e-3"],
    "state_space": ["--longest", "1024"],
    "positions": ["--steps", "4"],
    "kv_heads": ["--steps", "4"],
    "length_bias": ["--steps", "4", "--rates", "3e-5"],
    "reward_kl": ["--methods", "DPO", "KTO", "--rates", "1e-3"],
    "offline_iterative": ["--pairs", "64", "--rates", "1e-3"],
    "deterministic": ["--steps", "16"],
    "kto_imbalance": ["--steps", "4", "--rates", "1e-3", "--arms", "DPO", "KTO, 1:1, unpaired", "KTO, 10:1, weighted"],
    "lora_rank": ["--steps", "4", "--rates", "3e-3", "--arms", "full", "all, r 1", "all, r 4"],
    "both_fall": ["--steps", "4", "--rates", "3e-5", "--arms", "DPO", "Step-DPO"],
    "page_waste": [],
    "loops": ["--rates", "3e-5", "--rounds", "2", "--arms", "offline DPO", "iterative DPO", "SPIN"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_at_test_size(name, tmp_path):
    plot = tmp_path / "plot.svg"
    command = [sys.executable, str(STUDIES / f"{name}.py"), "--scale", "test", "--seeds", "2", "--svg", str(plot)]
    found = subprocess.run([*command, *COMMANDS[name]], capture_output=True, text=True, check=True)
    assert "| --- |" in found.stdout and "nan" not in found.stdout
    lines = [part for part in ElementTree.fromstring(plot.read_text()) if part.tag.endswith("polyline")]
    assert len(lines) >= 3


@pytest.mark.slow
def test_traffic_of_attention_at_test_size(tmp_path):
    plot = tmp_path / "plot.svg"
    command = [sys.executable, str(STUDIES / "attention_traffic.py"), "--longest", "1024", "--svg", str(plot)]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout.count("\n| --- |") == 2 and "nan" not in found.stdout
    assert ElementTree.fromstring(plot.read_text()).tag.endswith("svg")
