"""A language whose answers can be counted: rewards, log-probabilities, optima and KL of a model are exact.

A prompt is PLACES letters, an answer up to LONGEST tokens: letters and the token that ends it (an answer of LONGEST
letters ends by itself). So a prompt has 1,365 answers in all, a model's probabilities of them add up to 1, and what is
said of it below are sums over all of them, free of sampling noise. The reward r(x, y) is a program: 1 for each letter
of the answer that repeats the prompt's at the same place, -1/2 for each other letter.

A `World` is one seed's: prompts of which some are held out, a small reference model that was fine-tuned on careless
copies of prompts, and nothing else; pairs of its own answers are drawn and judged by the reward, P(y ≻ y') =
σ(r(x, y) - r(x, y')) (Bradley & Terry 1952), or by which is larger.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from common import PLAN, Rows

from llm_jax import objectives
from llm_jax.models import Decoder, ModelConfig, bind, declarations, init_params
from llm_jax.training import Objective, OptimizerConfig, init_state, make_optimizer, make_train_step, weights_in_use

LETTERS, PLACES, LONGEST = 4, 4, 5
END = LETTERS
MODEL = ModelConfig(
    vocab_size=LETTERS + 1, hidden_size=32, num_heads=2, num_layers=2, intermediate_size=64, max_position_embeddings=16
)
COPIED, ENDED, COMMON = 0.3, 0.2, (0.4, 0.3, 0.2, 0.1)
"""Careless copies: at each place the end with ENDED, else the prompt's letter with COPIED, else one by COMMON."""
OPTIMA = np.geomspace(0.02, 200, 400)
"""Temperatures of the curves of optima."""


def _answers() -> np.ndarray:
    letters = [itertools.product(range(LETTERS), repeat=length) for length in range(LONGEST + 1)]
    return np.array([(*one, *[END] * (LONGEST - len(one))) for one in itertools.chain(*letters)], np.int32)


ANSWERS = _answers()
"""int32[answers, LONGEST], filled up with END."""
LENGTHS = np.minimum((ANSWERS != END).sum(-1) + 1, LONGEST).astype(np.int32)
"""Tokens of each, the one that ends it included."""
STEMS = np.array([*itertools.product(range(LETTERS), repeat=LONGEST - 1)], np.int32)
"""All answers but for their last letter: what a model says behind each part of these says all of all answers."""
_STEM_OF = np.where(ANSWERS == END, 0, ANSWERS)[:, :-1] @ LETTERS ** np.arange(LONGEST - 1)[::-1]
PROMPTS = np.array([*itertools.product(range(LETTERS), repeat=PLACES)], np.int32)


def rewards(prompts: np.ndarray) -> np.ndarray:
    """r(x, y) of prompts int32[N, PLACES]: float64[N, answers]."""
    letters = (ANSWERS != END).sum(-1)
    right = (ANSWERS[None, :, :PLACES] == prompts[:, None]).sum(-1)
    return right - 0.5 * (letters - right)


def answer_logps(policy: Decoder, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
    """float32[N]: log-probabilities of answers in nats; `tokens` int32[N, PLACES + LONGEST], prompts in front."""
    hidden, _, _ = policy(tokens[:, :-1])
    logps = jax.nn.log_softmax(policy.logits(hidden[:, PLACES - 1 :]))
    own = jnp.take_along_axis(logps, tokens[:, PLACES:, None], axis=-1)[..., 0]
    return jnp.where(jnp.arange(LONGEST) < lengths[:, None], own, 0.0).sum(-1)


@functools.partial(jax.jit, static_argnames="decoder")
def _table(decoder: Decoder, params: Any, prompts: jax.Array) -> jax.Array:
    policy = bind(decoder, params)

    def one(prompt: jax.Array) -> jax.Array:
        before = jnp.broadcast_to(prompt, (len(STEMS), PLACES))
        hidden, _, _ = policy(jnp.concatenate([before, STEMS], axis=1))
        logps = jax.nn.log_softmax(policy.logits(hidden[:, PLACES - 1 :]))
        own = logps[_STEM_OF[:, None], np.arange(LONGEST), ANSWERS]
        return jnp.where(np.arange(LONGEST) < LENGTHS[:, None], own, 0.0).sum(-1)

    return jax.lax.map(one, prompts)


DECODER = functools.cache(lambda: Decoder(MODEL))


def table(params: Any, prompts: np.ndarray) -> np.ndarray:
    """float64[N, answers]: log-probabilities of all answers to prompts int32[N, PLACES]."""
    return np.asarray(_table(DECODER(), params, jnp.asarray(prompts)), np.float64)


class Point(NamedTuple):
    """A policy, on average over prompts."""

    kl: float
    """KL(policy || reference) over whole answers, nats."""
    reward: float
    """Mean true reward of its answers."""


def point(logps: np.ndarray, ref_logps: np.ndarray, values: np.ndarray) -> Point:
    """Of log-probabilities float64[N, answers] and rewards, all answers counted."""
    probs = np.exp(logps)
    return Point(*(float((probs * each).sum(-1).mean()) for each in (logps - ref_logps, values)))


def tilted(ref_logps: np.ndarray, utility: np.ndarray, strength: float) -> np.ndarray:
    """Log-probabilities of π(y|x) ∝ π_ref(y|x) exp(u(x, y) / strength), which maximizes E[u] - strength KL."""
    logits = ref_logps + utility / strength
    return (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )


def win_rates(ref_logps: np.ndarray, values: np.ndarray, certain: bool = False) -> np.ndarray:
    """P(y ≻ y' | x) on average over the reference's answers y', of each y: what IPO's optimum is tilted by.

    By Bradley-Terry, or (`certain`) 1 for the larger reward and 1/2 for the same; float64[N, answers].
    """
    out = np.zeros_like(values)
    for i, (own, logps) in enumerate(zip(values, ref_logps)):
        levels, place = np.unique(own, return_inverse=True)
        mass = np.bincount(place, np.exp(logps))
        gaps = levels[:, None] - levels
        out[i] = ((np.sign(gaps) + 1) / 2 if certain else 1 / (1 + np.exp(-gaps)))[place] @ mass
    return out


class Feed(Protocol):
    """What is trained on: so many examples, and rows of some of them."""

    @property
    def count(self) -> int: ...

    def rows(self, index: np.ndarray) -> Rows: ...


def _rows(world: "World", prompts: np.ndarray, answers: np.ndarray) -> Rows:
    """Of prompts [n] (numbers of training prompts) and answers [n, 2] to each."""
    before = np.repeat(world.train[prompts][:, None], 2, axis=1)
    return {
        "tokens": np.concatenate([before, ANSWERS[answers]], axis=-1),
        "lengths": LENGTHS[answers],
        "ref_logps": world.train_logps[prompts[:, None], answers].astype(np.float32),
    }


@dataclass(frozen=True)
class Pairs:
    world: "World"
    prompts: np.ndarray
    answers: np.ndarray
    """int[n, 2]: the chosen and the rejected one."""

    @property
    def count(self) -> int:
        return len(self.prompts)

    def rows(self, index: np.ndarray) -> Rows:
        return _rows(self.world, self.prompts[index], self.answers[index])

    def labelled(self) -> "Labelled":
        """The same answers one by one."""
        labels = np.tile([True, False], self.count)
        return Labelled(self.world, np.repeat(self.prompts, 2), self.answers.ravel(), labels)


@dataclass(frozen=True)
class Labelled:
    """Answers with a label each; a row holds beside each the answer of the next one of its batch, for KTO's z."""

    world: "World"
    prompts: np.ndarray
    answers: np.ndarray
    labels: np.ndarray

    @property
    def count(self) -> int:
        return len(self.prompts)

    def rows(self, index: np.ndarray) -> Rows:
        own = self.answers[index]
        beside = np.stack([own, np.roll(own, -1)], axis=1)
        return _rows(self.world, self.prompts[index], beside) | {"labels": self.labels[index]}

    def some(self, index: np.ndarray) -> "Labelled":
        return Labelled(self.world, self.prompts[index], self.answers[index], self.labels[index])


@dataclass(frozen=True)
class World:
    """One seed's reference and prompts."""

    params: Any
    train: np.ndarray
    held_out: np.ndarray
    """Prompts int32[N, PLACES]."""
    train_logps: np.ndarray
    held_out_logps: np.ndarray
    """The reference's, float64[N, answers]."""

    def pairs(self, count: int, seed: int, certain: bool = False) -> Pairs:
        """Two of the reference's answers each, judged by Bradley-Terry, or (`certain`) by which reward is larger.

        Equal answers are drawn again, and with `certain` those of the same reward.
        """
        chance, values = np.random.default_rng([seed, 2]), rewards(self.train)
        prompts = chance.integers(len(self.train), size=2 * count)
        answers = np.stack([drawn(chance, self.train_logps, prompts) for _ in range(2)], axis=1)
        gaps = values[prompts, answers[:, 0]] - values[prompts, answers[:, 1]]
        kept = np.flatnonzero(gaps != 0 if certain else answers[:, 0] != answers[:, 1])[:count]
        first = gaps > 0 if certain else chance.uniform(size=len(gaps)) < 1 / (1 + np.exp(-gaps))
        answers = np.where(first[:, None], answers, answers[:, ::-1])
        return Pairs(self, prompts[kept], answers[kept])

    def at(self, params: Any) -> Point:
        """Of a policy, on held-out prompts."""
        return point(table(params, self.held_out), self.held_out_logps, rewards(self.held_out))

    def optimum(self, utility: np.ndarray, strengths: Iterable[float] = OPTIMA[::-1]) -> list[Point]:
        """Policies tilted by `utility`, least KL first; by the reward itself no policy is better at the same KL."""
        values = rewards(self.held_out)
        return [
            point(tilted(self.held_out_logps, utility, strength), self.held_out_logps, values) for strength in strengths
        ]


def drawn(chance: np.random.Generator, logps: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    """An answer to each of the prompts [n] by log-probabilities [N, answers]."""
    upper = np.cumsum(np.exp(logps), axis=-1)
    marks = chance.uniform(size=len(prompts)) * upper[prompts, -1]
    return np.array([np.searchsorted(upper[prompt], mark, side="right") for prompt, mark in zip(prompts, marks)])


def careless(chance: np.random.Generator, prompts: np.ndarray) -> np.ndarray:
    """Copies of prompts [n, PLACES] as the reference is taught them: int32[n, LONGEST]."""
    shape = (len(prompts), LONGEST)
    letters = chance.choice(LETTERS, size=shape, p=COMMON)
    copied = chance.uniform(size=(len(prompts), PLACES)) < COPIED
    letters[:, :PLACES] = np.where(copied, prompts, letters[:, :PLACES])
    ended = np.cumsum(chance.uniform(size=shape) < ENDED, axis=-1) > 0
    return np.where(ended, END, letters).astype(np.int32)


def _objective(loss: Callable[[jax.Array, Any], jax.Array]) -> Objective:
    """Mean over a batch of `loss(log-probabilities [n, answers of a row], rows)`, values [n]."""

    def terms(params: Any, frozen: Any, rows: Any, statistics: Any, key: jax.Array) -> Any:
        del frozen, statistics, key
        shape = rows["lengths"].shape
        tokens, lengths = rows["tokens"].reshape(-1, PLACES + LONGEST), rows["lengths"].ravel()
        logps = answer_logps(bind(DECODER(), params["policy"]), tokens, lengths)
        return {"loss": loss(logps.reshape(shape), rows).sum()}, {}

    return Objective(terms, lambda batch: {"loss": jnp.float32(batch["lengths"].shape[1])})


def _program(loss: Callable[..., Any], rate: float, steps: int) -> tuple[Any, Any, Any]:
    """Adam, warm-up over a twentieth and no decay after it: every look is at a policy like any other."""
    declared = {"policy": declarations(DECODER())}
    options = OptimizerConfig(
        learning_rate=rate, warmup_steps=steps // 20, schedule="constant", weight_decay=0.0, beta2=0.99
    )
    optimizer = make_optimizer(options, declared, steps)
    return make_train_step(_objective(loss), optimizer, PLAN(), declared), optimizer, declared


def _likelihood(logps: jax.Array, rows: Any) -> jax.Array:
    """Per token, so that the rate means the same whatever lengths are."""
    return -logps[:, 0] / rows["lengths"].mean()


@functools.cache
def _teaching(steps: int) -> tuple[Any, Any, Any]:
    return _program(_likelihood, 3e-3, steps)


@functools.cache
def make_world(seed: int, steps: int = 800, held_out: int = 32, batch: int = 128) -> World:
    """Teaches a reference of its own random weights; three quarters of the prompts are for training."""
    chance = np.random.default_rng([seed, 1])
    prompts = chance.permutation(PROMPTS)
    train = prompts[: len(prompts) * 3 // 4]
    step, optimizer, declared = _teaching(steps)
    state = init_state({"policy": init_params(DECODER(), seed)}, optimizer, declared, PLAN())
    for _ in range(steps):
        x = train[chance.integers(len(train), size=batch)]
        y = careless(chance, x)
        lengths = np.minimum((y != END).sum(-1, keepdims=True) + 1, LONGEST).astype(np.int32)
        state, _ = step(state, {"tokens": np.concatenate([x, y], -1)[None, :, None], "lengths": lengths[None]})
    params = jax.device_get(weights_in_use(state)["policy"])
    held = prompts[len(train) :][:held_out]
    return World(params, train, held, table(params, train), table(params, held))


@dataclass(frozen=True)
class Method:
    """A loss and what is swept of it."""

    strengths: tuple[float, ...]
    loss: Callable[[float], Callable[[jax.Array, Any], jax.Array]]
    """Strength -> `loss(logps [n, 2], rows) -> [n]`."""
    unpaired: bool = False


def of_pairs(loss: Callable[..., Any], reference: bool = True, lengths: bool = False, name: str = "beta") -> Any:
    """A loss of `llm_jax.objectives` on pairs, as `Method` takes it."""

    def at(strength: float) -> Callable[[jax.Array, Any], jax.Array]:
        def values(logps: jax.Array, rows: Any) -> jax.Array:
            given = {name: strength}
            if lengths:
                given |= {"chosen_lengths": rows["lengths"][:, 0], "rejected_lengths": rows["lengths"][:, 1]}
            ref = (rows["ref_logps"][:, 0], rows["ref_logps"][:, 1]) if reference else ()
            return loss(logps[:, 0], logps[:, 1], *ref, **given)[0]

        return values

    return at


def of_answers(desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> Any:
    """KTO, z of the batch's mismatched answers, as `Method` takes it."""

    def at(beta: float) -> Callable[[jax.Array, Any], jax.Array]:
        def values(logps: jax.Array, rows: Any) -> jax.Array:
            ref = rows["ref_logps"]
            z = objectives.kto_kl(logps[:, 1], ref[:, 1])
            return objectives.kto(
                logps[:, 0], ref[:, 0], rows["labels"], z, beta, desirable_weight, undesirable_weight
            )[0]

        return values

    return at


class Aligner:
    """A loss at a strength and a learning rate, compiled once for all worlds."""

    def __init__(self, loss: Callable[[jax.Array, Any], jax.Array], rate: float, steps: int):
        self.steps = steps
        self.step, self.optimizer, self.declared = _program(loss, rate, steps)

    def __call__(self, world: World, feed: Feed, seed: int, batch: int, looks: Sequence[int]) -> list[Any]:
        """The policy's parameters after each of `looks` steps; the seed orders the examples."""
        order = np.random.default_rng([seed, 3])
        places = np.concatenate([order.permutation(feed.count) for _ in range(-(-self.steps * batch // feed.count))])
        state = init_state({"policy": jax.tree.map(np.asarray, world.params)}, self.optimizer, self.declared, PLAN())
        found = []
        for step, index in enumerate(places[: self.steps * batch].reshape(self.steps, batch), start=1):
            state, _ = self.step(state, {name: x[None] for name, x in feed.rows(index).items()})
            if step in looks:
                found.append(jax.device_get(weights_in_use(state)["policy"]))
        return found
