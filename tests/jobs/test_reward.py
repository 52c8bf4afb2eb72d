"""Reward models: whole steps, tokens and scores against TRL's, rankings and classes against closed forms, meshes."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import llm_jax
from llm_jax.base.errors import UserError
from llm_jax.base.trees import flatten
from llm_jax.data.config import DataConfig
from llm_jax.data.prepare import prepare
from llm_jax.data.rows import empty_row, steps_schema
from llm_jax.data.tokenizers import load_tokenizer
from llm_jax.jobs.reward_terms import classes_objective, macro_f1, pairs_objective, rankings_objective
from llm_jax.models import Decoder, HeadConfig, Model, ModelConfig, init_params, load, save
from llm_jax.models.families.heads import PAIRWISE
from llm_jax.models.parameter import abstract_params, declarations
from llm_jax.sharding.config import MeshConfig
from llm_jax.sharding.plan import make_plan, storage_shardings
from llm_jax.training.step import make_grads
from llm_jax.training.terms import Objective
from tests.jobs.batches import Document, Pair, document_rows, evaluate, pair_rows
from tests.jobs.test_trl import GOLDEN, HF_CONFIG, SEED, assert_equals_trl, hf_shapes
from tests.oracles.recipe import draw

CASES = ("strings", "chat", "margins")
HEAD = 8.0
CENTRED = 0.01


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The oracle's model through a folder of `LlamaForSequenceClassification`, with its tokenizer."""
    folder = tmp_path_factory.mktemp("scorer")
    shapes = {name: shape for name, shape in hf_shapes().items() if name != "lm_head.weight"}
    shapes["score.weight"] = (1, HF_CONFIG["hidden_size"])
    weights = {n: draw(n, s, SEED) * np.float32(HEAD if n == "score.weight" else 1) for n, s in shapes.items()}
    fields = HF_CONFIG | {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1, "pad_token_id": 0}
    (folder / "config.json").write_text(json.dumps(fields))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for file in (GOLDEN / "tokenizer").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return load(folder)


def golden(kind: str) -> tuple[dict[str, np.ndarray], list[dict]]:
    arrays = dict(np.load(GOLDEN / f"reward_{kind}.npz"))
    return arrays, json.loads(str(arrays["tokens"]))


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("kind", CASES)
def test_a_step_equals_trl(scorer: Model, kind: str, packed: bool):
    arrays, records = golden(kind)
    pairs = [Pair([], each["chosen_ids"], each["rejected_ids"]) for each in records]
    rows = pair_rows([pairs] if packed else [[pair] for pair in pairs], 384, most_pairs=4)
    margins = np.array([each["record"].get("margin", np.nan) for each in records], np.float32)
    rows["margin"] = np.where(rows["pair_index"] >= 0, margins[rows["pair_index"]], np.nan)
    objective = pairs_objective(scorer.decoder, CENTRED if kind == "margins" else None, pad_id=0)
    assert_equals_trl(scorer, evaluate(objective, scorer.params, {}, rows), arrays)


@pytest.mark.parametrize("kind", CASES)
def test_tokens_and_margins_equal_trl(kind: str, tmp_path: Path):
    _, records = golden(kind)
    rows = prepared("preference", [each["record"] for each in records], tmp_path)
    ours = set()
    for row in rows:
        for pair in range(1, row["pair_id"].max() + 1):
            sides = [(row["pair_id"] == pair) & (row["side"] == side) for side in (1, 2)]
            margin = None if np.isnan(row["margin"][pair - 1]) else float(row["margin"][pair - 1])
            ours.add((*(tuple(row["tokens"][side].tolist()) for side in sides), margin))
    assert ours == {(tuple(e["chosen_ids"]), tuple(e["rejected_ids"]), e["record"].get("margin")) for e in records}


@pytest.mark.parametrize("kind", CASES)
def test_scores_of_texts_equal_transformers(scorer: Model, kind: str, tmp_path: Path):
    """Through our own folder, written and read again: TRL's rewards of the same texts."""
    arrays, records = golden(kind)
    save(scorer, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForSequenceClassification"]
    assert scorer.tokenizer_dir is not None
    before = load_file(scorer.tokenizer_dir / "model.safetensors")
    after = load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys() and all((before[name] == after[name]).all() for name in before)
    prompts = [each["record"]["prompt"] for each in records] * 2
    answers = [each["record"][side] for side in ("chosen", "rejected") for each in records]
    texts = [answer if isinstance(answer, str) else answer[0]["content"] for answer in answers]
    np.testing.assert_allclose(llm_jax.score(tmp_path, prompts, texts), arrays["rewards"], rtol=1e-5)
    both = llm_jax.score([scorer, tmp_path], prompts, texts, batch_size=4)
    assert both.shape == (2, len(texts))
    np.testing.assert_allclose(both, np.stack([arrays["rewards"]] * 2), rtol=1e-5)


def prepared(kind: Any, records: list[dict], folder: Path, window: int = 160, **fields: Any) -> list[dict]:
    source = folder / "records.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    data = DataConfig(path=str(source), eval_path=str(source), window=window, **fields)
    made = prepare(kind, data, load_tokenizer(str(GOLDEN / "tokenizer")), str(folder / "rows"))
    return [made.train[i] for i in range(len(made.train))]


def tiny(labels: int, pooling: Any = "last", seed: int = 0, **extra: Any) -> Model:
    """A random model of 64 tokens that ends in scores, as the oracle's tokenizer reads it."""
    head = HeadConfig(labels, pooling, bias=pooling == "none")
    config = ModelConfig(
        vocab_size=288, hidden_size=32, intermediate_size=48, num_layers=1, num_heads=4, init_std=0.3, head=head
    )
    decoder = Decoder(config)
    return Model(decoder, init_params(decoder, seed), decoder.config, GOLDEN / "tokenizer", extra=extra)


RANKINGS = [
    {"prompt": "2 + 2 =", "completions": [" 4", " 5", " then", " the cat"]},
    {"prompt": "The cat", "completions": ["The hat", "Answer: 21", " is"], "ranks": [2, 3, 1]},
    {"prompt": "The hat", "completions": ["21", "22"], "scores": [0.25, 0.5]},
]
ORDERS = [(0, 1, 2, 3), (2, 0, 1), (1, 0)]


@pytest.mark.parametrize("loss", ["all_pairs", "plackett_luce"])
def test_rankings_of_packed_rows(loss: Any, tmp_path: Path):
    """Each answer's score as on its own, the loss in float64 from the scores, the mean over rankings."""
    model = tiny(1)
    rows = {name: np.stack(x) for name, x in columns(prepared("ranking", RANKINGS, tmp_path)).items()}
    ours, metrics, _ = evaluate(rankings_objective(model.decoder, loss, pad_id=0), model.params, {}, rows)
    losses, accuracies, everything = [], [], []
    for record, order in zip(RANKINGS, ORDERS, strict=True):
        answers = [record["completions"][i] for i in order]
        r = llm_jax.score(model, [record["prompt"]] * len(answers), answers).astype(np.float64)
        everything += r.tolist()
        pairs = [(i, j) for i in range(len(r)) for j in range(i + 1, len(r))]
        accuracies.append(np.mean([r[i] > r[j] for i, j in pairs]))
        if loss == "all_pairs":
            losses.append(np.mean([np.log1p(np.exp(r[j] - r[i])) for i, j in pairs]))
        else:
            losses.append(sum(np.log(np.exp(r[i:]).sum()) - r[i] for i in range(len(r))))
    np.testing.assert_allclose(ours, np.mean(losses), rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], np.mean(accuracies), rtol=1e-6)
    np.testing.assert_allclose(metrics["min_reward"], min(everything), rtol=1e-5)
    np.testing.assert_allclose(metrics["max_reward"], max(everything), rtol=1e-5)


def columns(rows: list[dict]) -> dict[str, list]:
    return {name: [row[name] for row in rows] for name in rows[0]}


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_classes_of_packed_texts(pooling: Any, tmp_path: Path):
    """Cross-entropy, accuracy and macro F1 from the scores of each text alone."""
    texts = ["The cat is on the mat.", "23 - 2 = 21", "Answer: 21", "The hat", "Là-bas"]
    labels = [2, 0, 0, 2, 1]
    model = tiny(3, pooling)
    records = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
    rows = {name: np.stack(x) for name, x in columns(prepared("labelled", records, tmp_path)).items()}
    ours, metrics, _ = evaluate_with_summary(classes_objective(model.decoder, False, pad_id=0), model, rows)
    scores = llm_jax.score(model, [""] * len(texts), texts).astype(np.float64)
    logps = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    np.testing.assert_allclose(ours, -logps[np.arange(len(labels)), labels].mean(), rtol=1e-5)
    guesses = scores.argmax(-1)
    np.testing.assert_allclose(metrics["accuracy"], np.mean(guesses == labels), rtol=1e-6)
    f1 = []
    for c in set(labels) | set(guesses.tolist()):
        guessed, meant = guesses == c, np.array(labels) == c
        f1.append(2 * (guessed & meant).sum() / (guessed.sum() + meant.sum()))
    np.testing.assert_allclose(metrics["f1"], np.mean(f1), rtol=1e-6)


def evaluate_with_summary(objective: Objective, model: Model, rows: dict) -> tuple[Any, dict, dict]:
    plan = make_plan(MeshConfig(data=1), devices=jax.devices()[:1])
    run = make_grads(objective, plan, {"policy": declarations(model.decoder)})
    return run({"policy": model.params}, {}, {name: x[None] for name, x in rows.items()})


def test_f1_of_a_class_that_never_occurs():
    """Two classes of three: 2·1/(2+1) and 2·0/(1+0), the third counts for nothing."""
    both, label, guess = (jnp.array(x, jnp.float32) for x in ([1, 0, 0], [2, 1, 0], [1, 0, 0]))
    np.testing.assert_allclose(macro_f1(both, label, guess), (2 / 3 + 0) / 2, rtol=1e-6)


STEPS = [["23 - 2 = 21", "21 - 1 = 20", "Answer: 20"], ["The cat"]]


def test_process_rewards_are_those_of_calls_step_by_step(tmp_path: Path):
    """Scores read at step ends of a whole answer, of packed rows in training, and of one call a step."""
    model = tiny(2, "none")
    prompts = ["The cat has 23 mice. It eats 2, then 1.", [{"role": "user", "content": "Who?"}]]
    whole = llm_jax.step_scores(model, prompts, STEPS)
    assert [len(each) for each in whole] == [3, 1]
    for prompt, steps, scores in zip(prompts, STEPS, whole):
        for i in range(len(steps)):
            (alone,) = llm_jax.step_scores(model, [prompt], [steps[: i + 1]])
            np.testing.assert_allclose(alone[-1], scores[i], rtol=1e-5, atol=1e-6)
    records = [{"prompt": p, "completions": s, "labels": [1] * len(s)} for p, s in zip(prompts, STEPS)]
    records[0]["labels"] = [True, False, True]
    rows = {name: np.stack(x) for name, x in columns(prepared("steps", records, tmp_path)).items()}
    assert (rows["step_label"] >= 0).sum() == 4 and rows["tokens"].shape[0] == 1
    ours, *_ = evaluate_with_summary(classes_objective(model.decoder, True, pad_id=0), model, rows)
    flat, labels = np.concatenate(whole).astype(np.float64), np.array([1, 0, 1, 1])
    logps = flat - np.log(np.exp(flat).sum(-1, keepdims=True))
    np.testing.assert_allclose(ours, -logps[np.arange(4), labels].mean(), rtol=1e-5)
    # A held-out batch that is filled up, as its last one is.
    padding = empty_row(steps_schema(rows["tokens"].shape[1]))
    filled = {name: np.concatenate([x, padding[name][None]]) for name, x in rows.items()}
    padded, *_ = evaluate_with_summary(classes_objective(model.decoder, True, pad_id=0), model, filled)
    np.testing.assert_allclose(padded, ours, rtol=1e-6)


def test_a_preference_model_is_symmetric_and_trains_on_both_orders(tmp_path: Path):
    """P(a over b) + P(b over a) = 1, and the loss of a pair is -log P(chosen over rejected)."""
    model = tiny(1, **{PAIRWISE: True})
    asked = [{"role": "user", "content": "2 + 2 ="}]
    for name, prompt in (("strings", "2 + 2 ="), ("chat", asked)):
        p = llm_jax.compare(model, [prompt, prompt], [" 4", " 5"], [" 5", " 4"])
        np.testing.assert_allclose(p.sum(), 1.0, rtol=1e-6)
        sides = [t if name == "strings" else [{"role": "assistant", "content": t}] for t in (" 4", " 5")]
        record = {"prompt": prompt, "chosen": sides[0], "rejected": sides[1]}
        (tmp_path / name).mkdir()
        rows = {n: np.stack(x) for n, x in columns(prepared("compared", [record], tmp_path / name)).items()}
        ours, *_ = evaluate(pairs_objective(model.decoder, pad_id=0), model.params, {}, rows)
        np.testing.assert_allclose(ours, -np.log(p[0]), rtol=1e-5)
    with pytest.raises(UserError, match=r"llm_jax\.compare"):
        llm_jax.score(model, ["2 + 2 ="], [" 4"])


def batches() -> dict[str, dict[str, Any]]:
    """Packed rows of pairs, rankings and classes; the last row is all padding."""
    random = np.random.default_rng(0)
    rows, window = 16, 48

    def text(n: int) -> list[int]:
        return random.integers(4, 288, size=n).tolist()

    pairs = [[Pair(text(2), text(3 + r % 5), text(4)) for _ in range(1 + r % 2)] for r in range(rows - 1)]
    made = {"pairs": pair_rows([*pairs, []], window, most_pairs=2)}
    made["pairs"]["margin"] = np.where(random.random((rows, 2)) < 0.5, np.nan, 0.5).astype(np.float32)
    made["pairs"]["weight"] = random.random((rows, 2)).astype(np.float32)
    counts = [3 + r % 4 for r in range(rows - 1)] + [0]
    lm = document_rows([[Document(text(5), [0] * 5) for _ in range(n)] for n in counts], window)
    ids = np.arange(6)[None] < np.array(counts)[:, None]
    second = (np.arange(6)[None] >= 2) & (np.array(counts)[:, None] > 4)
    index = np.stack([np.array(counts) - 1, np.where(np.array(counts) > 4, 0, -1)], 1)
    made["rankings"] = lm | {"ranking_id": np.where(ids, 1 + second, 0), "ranking_index": np.minimum(index, 9)}
    made["classes"] = lm | {"label": random.integers(0, 3, (rows, 6)), "answer_index": np.where(ids, 1, -1)}
    return made


BATCHES = batches()


def grads_of(kind: str, mesh: MeshConfig, microbatches: int) -> tuple[Any, dict, dict]:
    decoder = tiny(3 if kind == "classes" else 1).decoder
    objectives = {
        "pairs": lambda: pairs_objective(decoder, CENTRED, pad_id=0),
        "rankings": lambda: rankings_objective(decoder, "plackett_luce", pad_id=0),
        "classes": lambda: classes_objective(decoder, False, pad_id=0),
    }
    plan = make_plan(mesh, devices=jax.devices()[: mesh.data * mesh.tensor])
    shardings = storage_shardings(declarations(decoder), abstract_params(decoder), plan)
    rows = {name: x.reshape(microbatches, -1, *x.shape[1:]) for name, x in BATCHES[kind].items()}
    params = {"policy": init_params(decoder, 0, shardings)}
    run = make_grads(objectives[kind](), plan, {"policy": declarations(decoder)})
    loss, metrics, grads = jax.device_get(run(params, {}, rows))
    return loss, metrics, flatten(grads["policy"])


@pytest.mark.parametrize("kind", BATCHES)
def test_meshes_and_microbatches_give_one_step(kind: str):
    want = grads_of(kind, MeshConfig(data=1), 1)
    got = grads_of(kind, MeshConfig(data=2, tensor=2, zero=3), 4)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    assert got[1].keys() == want[1].keys()
    for name, value in want[1].items():
        np.testing.assert_allclose(got[1][name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    for path, grad in want[2].items():
        assert np.linalg.norm(got[2][path] - grad) <= 1e-5 * max(np.linalg.norm(grad), 1e-6), path
