"""SFT and DPO against TRL 1.16's trainers: ids and masks, loss, metrics and gradients on fixed batches.

Gold files: `tests/oracles/trl_sft.py` and `trl_dpo.py`; weights come from the recipe there.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from llm_jax.data.config import DataConfig
from llm_jax.data.prepare import prepare
from llm_jax.data.tokenizers import load_tokenizer
from llm_jax.jobs.config import PreferenceConfig
from llm_jax.jobs.paired import paired_objective
from llm_jax.jobs.preference_loss import preference_loss
from llm_jax.jobs.scoring import answer_logps
from llm_jax.jobs.terms import sft_objective
from llm_jax.models.families import family
from llm_jax.models.loading import Model, load
from llm_jax.models.parameter import bind
from tests.jobs.batches import Document, Pair, document_rows, evaluate, pair_rows
from tests.oracles.recipe import draw

GOLDEN = Path(__file__).parents[1] / "golden" / "trl"
BETA = 0.1
SEED = 117
FURTHER = frozenset(
    {"implicit_kl"} | {f"{name}/{side}" for name in ("lengths", "probs") for side in ("chosen", "rejected")}
)
HF_CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 288,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


def hf_shapes() -> dict[str, tuple[int, ...]]:
    """Hugging Face names of a Llama of this config, and their shapes."""
    d, f, v = (HF_CONFIG[name] for name in ("hidden_size", "intermediate_size", "vocab_size"))
    q, kv = (HF_CONFIG[name] * HF_CONFIG["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    layer = {
        "input_layernorm": (d,),
        "post_attention_layernorm": (d,),
        "self_attn.q_proj": (q, d),
        "self_attn.k_proj": (kv, d),
        "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, q),
        "mlp.gate_proj": (f, d),
        "mlp.up_proj": (f, d),
        "mlp.down_proj": (d, f),
    }
    shapes = {"model.embed_tokens": (v, d), "model.norm": (d,), "lm_head": (v, d)}
    shapes |= {f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in layer.items()}
    return {f"{name}.weight": shape for name, shape in shapes.items()}


def load_with(folder: Path, other: float) -> Model:
    """The oracle's model through a Hugging Face folder: weights of `SEED` moved by a share towards the next seed's."""
    weights = {
        name: np.float32(1 - other) * draw(name, shape, SEED) + np.float32(other) * draw(name, shape, SEED + 1)
        for name, shape in hf_shapes().items()
    }
    (folder / "config.json").write_text(json.dumps(HF_CONFIG))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return load(folder)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_with(tmp_path_factory.mktemp("policy"), 0.0)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_with(tmp_path_factory.mktemp("reference"), 1.0)


def assert_equals_trl(
    model: Model, ours: tuple[Any, dict, dict], golden: dict[str, np.ndarray], further: frozenset[str] = frozenset()
) -> None:
    """Loss and metrics relative 1e-5, gradients per tensor ‖Δ‖₂/‖g‖₂ ≤ 1e-5; `further` are metrics TRL has none of."""
    loss, metrics, grads = ours
    np.testing.assert_allclose(loss, golden["loss"], rtol=1e-5)
    theirs = {name.removeprefix("metric:"): value for name, value in golden.items() if name.startswith("metric:")}
    assert metrics.keys() == theirs.keys() | further
    for name, value in theirs.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
    compared = set()
    for tensor in family("llama").tensors(model.decoder):
        (path,), (name,), layer = tensor.paths, tensor.names, tensor.layer
        grad = grads[path if layer is None else f"segments/0/0/{path}"]
        (grad,) = tensor.form.write([np.asarray(grad if layer is None else grad[layer])])
        theirs = golden[f"grad:{name}"]
        assert np.linalg.norm(grad - theirs) <= 1e-5 * np.linalg.norm(theirs), name
        compared.add(f"grad:{name}")
    assert compared == {name for name in golden if name.startswith("grad:")}


def trl_documents(batch: dict[str, np.ndarray]) -> list[Document]:
    """The documents of a TRL batch: padded rows, or one row without padding whose positions restart."""
    if "batch:position_ids" in batch:
        starts = np.flatnonzero(batch["batch:position_ids"][0] == 0)[1:]
        ids, labels = (np.split(batch[f"batch:{name}"][0], starts) for name in ("input_ids", "labels"))
    else:
        lengths = batch["batch:attention_mask"].sum(axis=1)
        ids, labels = ([x[:n] for x, n in zip(batch[f"batch:{k}"], lengths)] for k in ("input_ids", "labels"))
    return [Document(list(i), list(label != -100)) for i, label in zip(ids, labels)]


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("kind", ["completion", "assistant"])
def test_sft_equals_trl(policy: Model, kind: str, layout: str):
    golden = dict(np.load(GOLDEN / f"sft_{kind}_{layout}.npz"))
    documents = trl_documents(golden)
    rows = [[d] for d in documents] if layout == "padded" else [documents]
    batch = document_rows(rows, 192 if layout == "packed" else 96)
    ours = evaluate(sft_objective(policy.decoder), policy.params, {}, batch)
    assert_equals_trl(policy, ours, golden)


def trl_pairs(batch: dict[str, np.ndarray]) -> list[Pair]:
    """The pairs of a TRL batch: chosen rows, then rejected rows."""
    answers = []
    for ids, attended, completion in zip(
        *(batch[f"batch:{k}"] for k in ("input_ids", "attention_mask", "completion_mask"))
    ):
        start, stop = np.argmax(completion), attended.sum()
        answers.append((list(ids[:start]), list(ids[start:stop])))
    half = len(answers) // 2
    return [Pair(prompt, chosen, rejected) for (prompt, chosen), (_, rejected) in zip(answers[:half], answers[half:])]


@pytest.mark.parametrize("mode", ["stored", "live"])
@pytest.mark.parametrize("kind", ["strings", "chat"])
def test_dpo_equals_trl(policy: Model, reference: Model, kind: str, mode: Any):
    golden = dict(np.load(GOLDEN / f"dpo_{kind}.npz"))
    pairs = trl_pairs(golden)
    rows = pair_rows([pairs], 320, most_pairs=4)
    frozen = {"ref": reference.params}
    if mode == "stored":
        stored = jax.jit(lambda params: answer_logps(bind(reference.decoder, params), rows))(reference.params)
        for name, values in stored.items():
            np.testing.assert_allclose(values[0, : len(pairs)], golden[f"ref_{name}"], rtol=1e-5)
        rows |= {f"ref_{name}": values for name, values in stored.items()}
        frozen = {}
    objective = paired_objective(policy.decoder, preference_loss(PreferenceConfig(beta=BETA)), mode)
    assert_equals_trl(policy, evaluate(objective, policy.params, frozen, rows), golden, FURTHER)


def prepared(job: Any, records: list[dict], tokenizer: str, folder: Path) -> Iterator[dict[str, np.ndarray]]:
    """The rows that the data room makes of records."""
    source = folder / "records.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    data = DataConfig(path=str(source), eval_path=str(source), window=160)
    made = prepare(job, data, load_tokenizer(str(GOLDEN / tokenizer)), str(folder / "rows"))
    return (made.train[i] for i in range(len(made.train)))


SFT_TOKENS, DPO_TOKENS = (json.loads((GOLDEN / f"{name}_tokens.json").read_text()) for name in ("sft", "dpo"))


@pytest.mark.parametrize("kind", SFT_TOKENS)
def test_sft_tokens_equal_trl(kind: str, tmp_path: Path):
    expected = SFT_TOKENS[kind]
    tokenizer = "tokenizer_bos" if kind.endswith("_bos") else "tokenizer"
    ours = set()
    for row in prepared("sft", [each["record"] for each in expected], tokenizer, tmp_path):
        for segment in range(1, row["segment_ids"].max() + 1):
            here = row["segment_ids"] == segment
            ours.add((tuple(row["tokens"][here].tolist()), tuple(row["loss_mask"][here][1:].tolist())))
    # Whether a document's first token is marked makes no difference: nothing predicts it.
    assert ours == {(tuple(each["input_ids"]), tuple(each["mask"][1:])) for each in expected}


@pytest.mark.parametrize("kind", DPO_TOKENS)
def test_preference_tokens_equal_trl(kind: str, tmp_path: Path):
    expected = DPO_TOKENS[kind]
    tokenizer = "tokenizer_bos" if kind.endswith("_bos") else "tokenizer"
    ours = set()
    for row in prepared("preference", [each["record"] for each in expected], tokenizer, tmp_path):
        for pair in range(1, row["pair_id"].max() + 1):
            sides = [(row["pair_id"] == pair) & (row["side"] == side) for side in (1, 2)]
            ours.add(tuple((tuple(row["tokens"][s].tolist()), tuple(row["loss_mask"][s].tolist())) for s in sides))
    assert ours == {
        tuple(
            (tuple(each["prompt_ids"] + each[answer]), (0,) * len(each["prompt_ids"]) + (1,) * len(each[answer]))
            for answer in ("chosen_ids", "rejected_ids")
        )
        for each in expected
    }
