"""Pairs whose answers share their prompt's tokens in the row: the same losses and gradients as with a copy for each."""

from typing import Any

import jax
import numpy as np
import pytest

from llm_jax.base.config import bind
from llm_jax.base.errors import UserError
from llm_jax.base.trees import flatten
from llm_jax.data.encode import Encoded, Sequence
from llm_jax.data.fitting import Counts, Item, fit
from llm_jax.data.rows import fill_pair_row, pair_schema
from llm_jax.data.sharing import shared_tokens
from llm_jax.jobs.config import PreferenceConfig
from llm_jax.jobs.paired import paired_objective
from llm_jax.jobs.preference_loss import preference_loss
from llm_jax.jobs.reward_terms import pairs_objective
from llm_jax.models import HeadConfig
from llm_jax.models.config import ModelConfig
from llm_jax.models.decoder import Decoder
from llm_jax.models.experts_config import ExpertsConfig
from llm_jax.models.init import init_params
from llm_jax.models.latent_config import LatentConfig
from llm_jax.models.mamba_config import MambaConfig
from llm_jax.models.parameter import abstract_params, declarations
from llm_jax.models.rope_config import RopeScaling
from llm_jax.sharding import MeshConfig, make_plan, storage_shardings
from llm_jax.training.step import make_grads

VOCAB, WINDOW, ROWS = 64, 96, 8
ONE = MeshConfig(data=1)
SIZES = ((9, 3, 5), (1, 7, 4), (14, 2, 9), (6, 12, 1))
"""Tokens of prompts and of both answers; windows and chunks below are shorter than the longest prompt."""


def pair(prompt: list[int], chosen: list[int], rejected: list[int], share: bool) -> Item:
    sides = [
        Sequence(np.array(prompt + answer, np.int32), np.array([0] * len(prompt) + [1] * len(answer), np.uint8))
        for answer in (chosen, rejected)
    ]
    return Item((sides[0], sides[1]), shared=shared_tokens(*sides) if share else 0)


def rows(share: bool) -> dict[str, np.ndarray]:
    """Rows of none to three pairs."""
    random = np.random.default_rng(0)

    def ids(size: int) -> list[int]:
        return random.integers(1, VOCAB, size).tolist()

    schema, made, number = pair_schema(WINDOW, 3, share), [], 0
    for row in range(ROWS):
        pairs = []
        for i in range(row % 4):
            prompt, chosen, rejected = map(ids, SIZES[(row + i) % len(SIZES)])
            pairs.append(pair(prompt, chosen, rejected, share))
        made.append(fill_pair_row(schema, [(number + i, p) for i, p in enumerate(pairs)], np.ones(VOCAB), 0, 0))
        number += len(pairs)
    return {name: np.stack([row[name] for row in made]) for name in schema}


def config(**own: Any) -> ModelConfig:
    sizes = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4)
    return ModelConfig(**sizes, init_std=0.2, embed_init_std=1.0, **own)


EXPERTS = ExpertsConfig(num=4, top_k=2, intermediate_size=24)
KINDS: dict[str, dict[str, Any]] = {
    "grouped": {"num_kv_heads": 2},
    "window and sinks": {"sights": ("sliding", "full"), "window": 5, "sinks": True, "num_kv_heads": 1},
    "chunks": {"sights": ("chunked", "full"), "chunk": 4, "rope_layers": (True, False)},
    "ALiBi": {"positions": "alibi"},
    "learned positions": {"positions": "learned", "max_position_embeddings": WINDOW},
    "latent": {"latent": LatentConfig(kv_rank=8, q_rank=12, nope_dim=6, rope_dim=4, value_dim=6), "head_dim": 4},
    "experts": {"experts": EXPERTS},
}


def dpo(decoder: Decoder) -> Any:
    names = ("sigmoid", "ipo", "sft", "aot")
    loss = preference_loss(bind(PreferenceConfig, {"loss_type": names, "reference_logps": "live", "ld_alpha": 0.5}))
    return paired_objective(decoder, loss, "live")


def grads(decoder: Decoder, objective: Any, share: bool, mesh: MeshConfig = ONE) -> tuple:
    count = mesh.data * mesh.tensor
    plan = make_plan(mesh, devices=jax.devices()[:count])
    shardings = storage_shardings(declarations(decoder), abstract_params(decoder), plan)
    params = {"policy": init_params(decoder, 1, shardings)}, {"ref": init_params(decoder, 0, shardings)}
    roles = {"policy": declarations(decoder), "ref": declarations(decoder)}
    batch = {name: x[None] for name, x in rows(share).items()}
    loss, metrics, found = jax.device_get(make_grads(objective, plan, roles)(*params, batch))
    return loss, metrics, flatten(found["policy"])


def assert_equal(shared: tuple, copies: tuple, rounding: float = 1e-5) -> None:
    np.testing.assert_allclose(shared[0], copies[0], rtol=rounding)
    assert shared[1].pop("num_tokens") < copies[1].pop("num_tokens")
    for name, value in copies[1].items():
        # What is told of experts counts a shared prompt once.
        if not name.startswith(("experts/", "router")):
            np.testing.assert_allclose(shared[1][name], value, rtol=rounding, atol=2e-6, err_msg=name)
    everything = np.sqrt(sum(np.sum(grad**2) for grad in copies[2].values()) / len(copies[2]))
    for path, grad in copies[2].items():
        bound = rounding * max(np.linalg.norm(grad), 1e-3 * everything)
        assert np.linalg.norm(shared[2][path] - grad) <= bound, path


@pytest.mark.parametrize("kind", KINDS)
def test_losses_metrics_and_gradients_are_those_of_copies(kind: str):
    decoder = Decoder(config(**KINDS[kind]))
    assert_equal(grads(decoder, dpo(decoder), True), grads(decoder, dpo(decoder), False))


def test_scores_are_those_of_copies():
    decoder = Decoder(config(head=HeadConfig(1, "last")))
    objective = pairs_objective(decoder, 0.01, pad_id=0)
    assert_equal(grads(decoder, objective, True), grads(decoder, objective, False))


def test_on_a_mesh():
    decoder = Decoder(config(num_kv_heads=2))
    sharded = grads(decoder, dpo(decoder), True, MeshConfig(data=4, tensor=2, zero=3))
    assert_equal(sharded, grads(decoder, dpo(decoder), False))


def test_a_row_by_hand():
    """Places 0 to 3: the chosen side from the prompt's last token on, 4 to 6: the prompt, 7 and 8: the rejected answer;
    then a pair whose prompts are of one token, and nothing is shared."""
    pairs = [pair([5, 6, 7], [8, 9, 10], [11, 12], True), pair([5], [6], [7], True)]
    row = fill_pair_row(pair_schema(14, 2, True), list(enumerate(pairs)), np.ones(20, np.int32), 0, 0)
    assert [each.shared for each in pairs] == [2, 0] and sum(each.tokens for each in pairs) == 13
    assert row["tokens"].tolist() == [7, 8, 9, 10, 5, 6, 7, 11, 12, 5, 6, 5, 7, 0]
    assert row["positions"].tolist() == [2, 3, 4, 5, 0, 1, 2, 3, 4, 0, 1, 0, 1, 0]
    assert row["segment_ids"].tolist() == [1] * 4 + [2] * 5 + [3] * 2 + [4] * 2 + [0]
    assert row["loss_mask"].tolist() == [0, 1, 1, 1, 0, 0, 0, 1, 1, 0, 1, 0, 1, 0]
    seen = [[0, 6]] * 4 + [[4, 6]] * 2 + [[4, 9]] * 3 + [[9, 11]] * 2 + [[11, 13]] * 2 + [[0, 0]]
    assert row["visible"].tolist() == seen


def test_what_is_shared_ends_before_the_last_token_that_both_read():
    def made(ids: list[int], context: int) -> Sequence:
        mask = np.arange(len(ids)) >= context
        return Sequence(np.array(ids, np.int32), mask.astype(np.uint8))

    assert shared_tokens(made([1, 2, 3, 4, 5], 3), made([1, 2, 3, 4, 6], 3)) == 2  # Answers that begin alike.
    assert shared_tokens(made([1, 2, 3, 4], 3), made([1, 9, 3, 5], 3)) == 0  # Prompts that end otherwise.
    assert shared_tokens(made([1, 2, 3], 2), made([1, 2], 2)) == 1  # One without a target.
    assert shared_tokens(made([2], 1), made([3], 1)) == 0


def test_more_fits_a_window_and_what_is_cut_is_counted():
    item = pair(list(range(1, 21)), [30] * 10, [31] * 10, False)

    def fitted(window: int) -> tuple[list[Item], Counts]:
        counts = Counts()
        encoded = Encoded("a.jsonl:1", item.sequences, 20, False)
        return list(fit([encoded], window, "truncate", counts, share=True)), counts

    (whole,), counts = fitted(41)
    assert (whole.shared, whole.tokens, counts.tokens_read, counts.truncated) == (19, 41, 41, 0)
    (cut,), counts = fitted(33)
    assert [len(each.ids) for each in cut.sequences] == [26, 26] and cut.tokens == 33
    assert (counts.tokens_read, counts.tokens_truncated) == (41, 8)
    with pytest.raises(UserError, match=r"leaves no room for an answer in a window of 20: pair of 30 \+ 30 tokens"):
        fitted(20)


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"mixers": ("attention", "mamba"), "mamba": MambaConfig(inner_size=64, state_size=4, dt_rank=2)}, "attend"),
        ({"causal": False}, "attend"),
        ({"family": "llm_jax", "prefix_lm": True}, "attend"),
        ({"rope_scaling": RopeScaling("dynamic", factor=2.0)}, "kind=dynamic turns a document's first tokens"),
    ],
)
def test_models_that_cannot_share(own: dict[str, Any], said: str):
    with pytest.raises(UserError, match=said):
        config(**own).resolved().check_visible()
