"""Whole steps against TRL 1.16's DPO, KTO, CPO and ORPO trainers: raw text in; loss, metrics and gradients out.

Gold files: `tests/oracles/trl_preference.py`. Records go through the data room, and the packed rows through the job's
objectives; TRL pads the same records. All cases of a file share one forward pass and one program, since compiling a
model's gradient for each of thirty losses would take minutes; that a step computes what an objective says, on any mesh
and in any microbatches, is shown elsewhere.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.base.config import bind
from llm_jax.base.trees import flatten
from llm_jax.data.config import DataConfig
from llm_jax.data.prepare import prepare
from llm_jax.data.tokenizers import load_tokenizer
from llm_jax.jobs import paired, scoring, unpaired
from llm_jax.jobs.config import PreferenceConfig
from llm_jax.jobs.preference_loss import preference_loss
from llm_jax.models import Model
from llm_jax.models.families import family
from llm_jax.models.mtp import same_document
from llm_jax.training.terms import Objective, Statistics, divide_pairs, loss_pairs, total_loss
from tests.jobs.test_trl import load_with
from tests.oracles.recipe import project

GOLDEN = Path(__file__).parents[1] / "golden" / "trl"
FILES = {name: dict(np.load(GOLDEN / f"preference_{name}.npz")) for name in ("dpo", "kto", "cpo", "orpo")}
CASES = {
    name: [key.partition("/")[0] for key in file if key.endswith("/options") and not key.startswith("forward_kl")]
    for name, file in FILES.items()
}
CASES["near"] = ["forward_kl"]
FILES["near"] = FILES["dpo"]
OWN = {f"{name}/{side}" for name in ("lengths", "probs") for side in ("chosen", "rejected")}
"""Metrics that TRL has none of, beside `implicit_kl`."""
# TRL has it over the prompts' and the padding's logits too; ours is of the answers, as in its DPO trainer.
LOGITS = {"logits/chosen", "logits/rejected"}


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_with(tmp_path_factory.mktemp("policy"), 0.0)


def options_of(file: str, case: str) -> tuple[PreferenceConfig, float]:
    """A case's options as ours have them, and how far its reference lies from the policy."""
    given = {"loss_type": case, **json.loads(str(FILES[file][f"{case}/options"]))}
    other = given.pop("other", 1.0)
    if file == "orpo":
        given["loss_type"] = "orpo"
    if file == "cpo":
        # TRL's CPO trainer adds a likelihood to each of its losses; ours adds the loss `sft`.
        given["loss_type"] = "cpo" if given["loss_type"] == "sigmoid" else given["loss_type"]
        if given["loss_type"] == "simpo":
            alpha = given.pop("cpo_alpha")
            given |= {"loss_type": ("simpo", "sft"), "loss_weights": (1.0, alpha)} if alpha else {}
    given["reference_logps"] = "none" if file in ("cpo", "orpo") else "live"
    return bind(PreferenceConfig, given), other


def rows_of(file: str, folder: Path) -> dict[str, np.ndarray]:
    """The records of a file as all rows of one batch."""
    source = folder / "records.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in json.loads(str(FILES[file]["records"]))))
    tokenizer = load_tokenizer(str(GOLDEN / ("tokenizer_bos" if file in ("cpo", "orpo") else "tokenizer")))
    data = DataConfig(path=str(source), eval_path=str(source), window=160)
    kind = "unpaired_mismatched" if file == "kto" else "preference"
    return dict(prepare(kind, data, tokenizer, str(folder / "rows")).train.columns())


@pytest.fixture
def shared_forward() -> Iterator[None]:
    """Each model runs once over the same tokens in a program, however many objectives ask for it."""
    bound: dict[int, Any] = {}
    scored: dict[tuple[int, int], Any] = {}
    names = ("logps", "entropy", "mean_logit", "is_top1", "log_sum_sq_probs")
    bind_model, score_rows = paired.bind, scoring.score_rows

    def bind_once(decoder: Any, params: Any) -> Any:
        return bound.setdefault(id(params), bind_model(decoder, params))

    def score_once(decoder: Any, rows: Any, outputs: tuple[str, ...], also: Any = None) -> Any:
        key = id(decoder), id(rows["tokens"])
        if key not in scored:
            scored[key] = score_rows(decoder, rows, names, also=same_document(rows["segment_ids"], 1))
        scores, mask = scored[key]
        where = mask if also is None else mask | also
        return {name: jnp.where(where, scores[name], 0) for name in outputs}, mask

    with pytest.MonkeyPatch.context() as patch:
        for module in (paired, unpaired):
            patch.setattr(module, "bind", bind_once)
            patch.setattr(module, "score_rows", score_once)
        patch.setattr(scoring, "score_rows", score_once)
        yield


def steps(objectives: list[Objective], params: Any, frozen: Any, rows: Any) -> tuple[Any, Any, Any]:
    """Losses [cases], metrics, and gradients [cases, ...]."""

    def losses(params: Any) -> tuple[Any, list[dict[str, Any]]]:
        roles, values, metrics = {"policy": params}, [], []
        for objective in objectives:
            statistics = None
            if objective.batch_statistics is not None and objective.statistics_of_one:
                found = objective.batch_statistics(roles, frozen, rows, jax.random.key(0))
                statistics = Statistics(jax.tree.map(lambda x: x[None], found), jnp.int32(0))
            sums, pairs = objective.terms(roles, frozen, rows, statistics, jax.random.key(0))
            weights = objective.weights({name: x[None] for name, x in rows.items()})
            values.append(total_loss(objective, sums, weights))
            pairs = pairs if objective.summary is None else objective.summary(pairs)
            metrics.append(divide_pairs({**loss_pairs(sums, weights), **pairs}, objective.coefficients))
        return jnp.stack(values), metrics

    values, pull, metrics = jax.vjp(losses, params, has_aux=True)
    return values, metrics, jax.vmap(pull)(jnp.eye(len(objectives)))[0]


@pytest.mark.parametrize("file", CASES)
def test_steps_equal_trl(policy: Model, file: str, tmp_path: Path, shared_forward: None):
    configs, others = zip(*(options_of(file, case) for case in CASES[file]), strict=True)
    losses = [preference_loss(config) for config in configs]
    make = unpaired.unpaired_objective if file == "kto" else paired.paired_objective
    objectives = [make(policy.decoder, loss, c.reference_logps) for loss, c in zip(losses, configs, strict=True)]
    frozen = {} if configs[0].reference_logps == "none" else {"ref": load_with(tmp_path, others[0]).params}
    batch = rows_of(file, tmp_path)
    values, metrics, grads = jax.device_get(
        jax.jit(lambda params, frozen, rows: steps(objectives, params, frozen, rows))(policy.params, frozen, batch)
    )
    flat = flatten(grads)
    for i, case in enumerate(CASES[file]):
        golden = {key.partition("/")[2]: x for key, x in FILES[file].items() if key.startswith(f"{case}/")}
        np.testing.assert_allclose(values[i], golden["loss"], rtol=1e-5, err_msg=case)
        theirs = dict(zip(golden["metric_names"].tolist(), golden["metrics"].tolist(), strict=True))
        assert_metrics(file, case, metrics[i], theirs)
        norms, projections = (dict(zip(FILES[file]["tensors"].tolist(), golden[k])) for k in ("norms", "projections"))
        for tensor in family("llama").tensors(policy.decoder):
            (path,), (name,), layer = tensor.paths, tensor.names, tensor.layer
            grad = flat[path][i] if layer is None else flat[f"segments/0/0/{path}"][i, layer]
            (grad,) = tensor.form.write([np.asarray(grad)])
            difference = np.sqrt(np.mean((project(name, grad) - projections[name]) ** 2))
            assert difference <= 1e-5 * norms[name], (case, name, difference / norms[name])


def test_a_merged_token_is_learned_though_trls_cpo_leaves_it_out(tmp_path: Path):
    """Where an answer's first letter merges with two tokens of the prompt, TRL's CPO and ORPO trainers count the merged
    token to the prompt; its DPO trainer, like ours, lets the answer begin where both differ."""
    source = tmp_path / "records.jsonl"
    pair = json.loads((GOLDEN / "dpo_tokens.json").read_text())["strings"][1]["record"]
    source.write_text(json.dumps(pair) + "\n")
    data = DataConfig(path=str(source), eval_path=str(source), window=160)
    row = prepare("preference", data, load_tokenizer(str(GOLDEN / "tokenizer_bos")), str(tmp_path / "rows")).train[0]
    ids, mask = (row[name][row["side"] == 1] for name in ("tokens", "loss_mask"))
    theirs = FILES["cpo"]["merged_labels"] != -100
    np.testing.assert_array_equal(ids, FILES["cpo"]["merged_input_ids"])
    first = np.argmax(theirs)
    np.testing.assert_array_equal(mask == 1, np.arange(len(ids)) >= first - 1)


def assert_metrics(file: str, case: str, ours: dict[str, Any], theirs: dict[str, float]) -> None:
    """TRL's by their names, relative 1e-5, and beside them ours alone."""
    told = set(theirs)
    if file in ("cpo", "orpo"):
        told -= LOGITS
    if theirs.get("nll_loss") == 0 or case == "cpo_simpo":
        # Without a likelihood term TRL says 0; as a loss of its own it is `loss/sft`.
        told -= {"nll_loss"}
        assert ours.get("loss/sft", 0) == pytest.approx(theirs["nll_loss"], rel=1e-5)
    if case == "apo_zero_unpaired":
        told -= {"kl"}  # 0 there: it takes no z
    for name in told:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, err_msg=f"{case} {name}")
    own = OWN | ({"implicit_kl"} if file not in ("cpo", "orpo") else set(LOGITS) | TOKENS)
    assert {name for name in set(ours) - told if not name.startswith("loss")} == own, case


TOKENS = {"entropy", "mean_token_accuracy", "num_tokens"}
"""What TRL's experimental trainers leave out."""
