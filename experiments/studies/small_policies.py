"""Small policies that answer word problems, for studies of preference training: all in one process, on one core.

A `Ground` is what the runs of a study have in common: problems, a tokenizer, an architecture, and a first policy per
seed. An `Aligner` trains a policy on pairs with the objective of the job `preference`; `Answers` draws its answers.
"""

import functools
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from common import PLAN, Recipe, Rows, Trainer, stacked

from llm_jax.data.config import EmbeddedConfig
from llm_jax.data.embedded.problems import Problem, Split, is_correct, make_problem
from llm_jax.data.encode import encode_examples
from llm_jax.data.examples import Completion, Pair
from llm_jax.data.fitting import Item
from llm_jax.data.packing import best_fit_decreasing
from llm_jax.data.rows import fill_pair_row, pair_schema
from llm_jax.data.stepwise import StepPair
from llm_jax.data.tokenizer_training import train_bpe
from llm_jax.inference import Completion as Drawn
from llm_jax.inference import Generator, SamplingParams
from llm_jax.jobs.paired import paired_objective
from llm_jax.jobs.preference_loss import PreferenceLoss
from llm_jax.jobs.scoring import answer_logps
from llm_jax.models import Decoder, Model, ModelConfig, bind, declarations
from llm_jax.training import OptimizerConfig, init_state, make_optimizer, make_train_step, weights_in_use
from llm_jax.training.optimizer import Optimizer

Params = Mapping[str, Any]
Demonstrate = Callable[[Problem, random.Random], str]
"""An answer as the first policy learns to give it."""
COLUMNS = ("tokens", "segment_ids", "positions", "loss_mask", "pair_id", "side", "pair_index")


def problems(config: EmbeddedConfig, stream: str, count: int, split: Split = "train") -> list[Problem]:
    """Problems of a stream of their own; those of the split `eval` have numbers that no problem of `train` has."""
    return [make_problem(config, split, random.Random(f"{stream}/{split}/{i}")) for i in range(count)]


def asked(problem: Problem) -> str:
    """What an answer follows."""
    return problem.prompt + "\n"


@dataclass(frozen=True)
class Size:
    """Of the model, and of its first training."""

    width: int = 64
    layers: int = 3
    demonstrations: int = 20_000
    steps: int = 330
    rate: float = 6e-3


def demonstrations(config: EmbeddedConfig, demonstrate: Demonstrate, count: int) -> list[Completion]:
    """Of the same problems, whatever the answers."""
    chance = random.Random("demonstrations")
    return [Completion(asked(one), demonstrate(one, chance)) for one in problems(config, "demonstrations", count)]


class Ground:
    """Problems, a tokenizer, an architecture and demonstrations.

    Args:
      config: which numbers problems have.
      demonstrate: how the first policy learns to answer.
      size: of the model.
      window: tokens of a row, which has to hold a pair, two answers with a prompt each.
      vocab_size: of the tokenizer.
      texts: what the tokenizer is trained on beside demonstrations.
    """

    def __init__(
        self,
        config: EmbeddedConfig,
        demonstrate: Demonstrate,
        size: Size,
        window: int = 192,
        vocab_size: int = 512,
        texts: Sequence[str] = (),
    ):
        self.config, self.window = config, window
        self._answered = demonstrations(config, demonstrate, size.demonstrations)
        shown = [f"{one.prompt}{one.completion}" for one in self._answered[:2000]]
        self.tokenizer = train_bpe([*shown, *texts], vocab_size)
        model = ModelConfig(
            vocab_size=len(self.tokenizer.token_bytes),
            hidden_size=size.width,
            intermediate_size=3 * size.width,
            num_layers=size.layers,
            num_heads=4,
            max_position_embeddings=256,
            tie_embeddings=True,
            embed_init_std=0.1,
        )
        self.decoder = Decoder(model)
        self._trainer = Trainer(model, Recipe(size.steps, batch=16, rate=size.rate, looks=1))

    @functools.cached_property
    def rows(self) -> Rows:
        """The demonstrations, packed."""
        return self.packed(self._answered)

    def packed(self, answered: Sequence[Completion]) -> Rows:
        """Of further demonstrations; the answers are targets."""
        encoded = encode_examples("sft", [(str(i), one) for i, one in enumerate(answered)], self.tokenizer)
        sequences = [one.sequences[0] for one in encoded]
        packed = best_fit_decreasing([len(one.ids) for one in sequences], self.window)
        return stacked(self.tokenizer, self.window, [[sequences[i] for i in row] for row in packed])

    def start(self, seed: int) -> Params:
        """The first policy: random weights and the order of demonstrations are of the seed."""
        held_out = {name: x[:16] for name, x in self.rows.items()}
        return self._trainer(self.rows, held_out, seed).params

    def pairs(self, pairs: Iterable[Pair | StepPair]) -> Rows:
        """A row per pair."""
        encoded = encode_examples("preference", [(str(i), one) for i, one in enumerate(pairs)], self.tokenizer)
        schema, pad = pair_schema(self.window, 1), self.tokenizer.pad_id
        filled = []
        for number, one in enumerate(encoded):
            pair = number, Item(one.sequences)
            filled.append(fill_pair_row(schema, [pair], self.tokenizer.token_bytes, pad, 0))
        return {name: np.stack([row[name] for row in filled]) for name in COLUMNS}

    def logps(self, params: Params, rows: Rows, ld_alpha: float | None = None) -> dict[str, np.ndarray]:
        """`chosen_logps` and `rejected_logps` of pairs, float32[n, 1] each, nats."""
        return in_batches(functools.partial(_logps, self.decoder, ld_alpha, params), rows)

    def against(self, reference: Params, rows: Rows, ld_alpha: float | None = None) -> Rows:
        """Pairs with what a reference says of them."""
        said = self.logps(reference, rows, ld_alpha)
        return rows | {f"ref_{name}": values for name, values in said.items()}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _logps(decoder: Decoder, ld_alpha: float | None, params: Params, rows: Any) -> dict[str, jax.Array]:
    return answer_logps(bind(decoder, params), rows, ld_alpha)


def in_batches(function: Callable[[Rows], Any], rows: Rows, batch: int = 64) -> Any:
    """A function of rows, batch by batch; its arrays put together. The last batch is filled up with its first row."""
    count = len(rows["tokens"])
    parts = []
    for first in range(0, count, batch):
        places = np.arange(first, first + batch)
        places[places >= count] = first
        parts.append(jax.device_get(function({name: x[places] for name, x in rows.items()})))
    return jax.tree.map(lambda *each: np.concatenate(each)[:count], *parts)


class Aligner:
    """Preference training with one loss, compiled once for all seeds, learning rates and sets of pairs.

    AdamW without decay, warm-up over a tenth of the steps, then a constant rate.
    """

    def __init__(self, ground: Ground, loss: PreferenceLoss, steps: int, batch: int = 16):
        self.ground, self.steps, self.batch, self.ld_alpha = ground, steps, batch, loss.ld_alpha
        self.reference = any(term.named.reference for term in loss.terms)
        self.declared = {"policy": declarations(ground.decoder)}
        objective = paired_objective(ground.decoder, loss, "stored" if self.reference else "none")
        options = OptimizerConfig(
            learning_rate=1.0, warmup_steps=steps // 10, schedule="constant", weight_decay=0.0, beta2=0.99
        )
        self.optimizer = with_rate(make_optimizer(options, self.declared, steps))
        self.step = make_train_step(objective, self.optimizer, PLAN(), self.declared)

    def begin(self, params: Params, rate: float) -> "Run":
        state = init_state({"policy": jax.tree.map(np.array, params)}, self.optimizer, self.declared, PLAN())
        state["opt_state"]["rate"] = jax.numpy.float32(rate)
        return Run(self, state)

    def __call__(self, params: Params, rows: Rows, rate: float, seed: int) -> Params:
        """All steps on pairs, against `params` where the loss has a reference."""
        run = self.begin(params, rate)
        run.train(self.ground.against(params, rows, self.ld_alpha) if self.reference else rows, self.steps, seed)
        return run.params


class Run:
    """A policy in training."""

    def __init__(self, aligner: Aligner, state: dict[str, Any]):
        self.aligner, self.state = aligner, state

    def train(self, rows: Rows, steps: int, seed: int, look: Callable[[Params], Any] | None = None, looks: int = 1):
        """So many steps on pairs in an order of the seed's, each pair once before any comes again.

        Returns what `look` says of the policy at `looks` places, evenly spaced, the last one at the end.
        """
        count, batch, seen = len(rows["tokens"]), self.aligner.batch, []
        order = np.random.default_rng(seed)
        places = np.concatenate([order.permutation(count) for _ in range(-(-steps * batch // count))])
        ends = {round(steps * (i + 1) / looks) for i in range(looks)}
        for number, chosen in enumerate(places[: steps * batch].reshape(steps, 1, batch), 1):
            self.state, metrics = self.aligner.step(self.state, {name: x[chosen] for name, x in rows.items()})
            if not metrics["finite"]:
                raise SystemExit(f"step {number}: loss or gradient are not finite")
            if look is not None and number in ends:
                seen.append(look(self.params))
        return seen

    @property
    def params(self) -> Params:
        return jax.device_get(weights_in_use(self.state)["policy"])


def with_rate(optimizer: Optimizer) -> Optimizer:
    """An optimizer without decay, whose learning rate is one more number of its state.

    The update of every rule is a multiple of the rate, so that of a rate of 1 is multiplied.
    """

    def init(params: Any) -> dict[str, Any]:
        return optimizer.init(params) | {"rate": jax.numpy.ones(())}

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, dict[str, Any]]:
        rate = state["rate"]
        updates, new = optimizer.update(grads, {n: x for n, x in state.items() if n != "rate"}, params)
        return jax.tree.map(lambda x: rate * x, updates), new | {"rate": rate}

    return optimizer._replace(init=init, update=update)


class Answers:
    """Draws answers to problems, with any weights of the ground's architecture."""

    def __init__(self, ground: Ground, params: Params, max_tokens: int = 64):
        self.ground, self.max_tokens = ground, max_tokens
        model = Model(ground.decoder, params, ground.decoder.config)
        self.generator = Generator(model, ground.tokenizer, max_batch=256, chunk=16)

    def __call__(
        self, params: Params, problems: Sequence[Problem], *, n: int = 1, temperature: float = 1.0, seed: int = 0
    ) -> list[list[Drawn]]:
        """n answers to each problem."""
        self.generator.update_params(params)
        prompts = [self.ground.tokenizer.encode(asked(problem), add_special_tokens=True) for problem in problems]
        each = [
            SamplingParams(self.max_tokens, temperature, n=n, seed=(seed << 32) + number)
            for number in range(len(problems))
        ]
        drawn = self.generator.generate(prompts, each)
        return [drawn[i : i + n] for i in range(0, len(drawn), n)]

    def exact_match(self, params: Params, problems: Sequence[Problem]) -> np.ndarray:
        """bool[problems]: which are answered rightly, decoded greedily."""
        found = self(params, problems, temperature=0.0)
        return np.array([is_correct(problem, one.text) for problem, (one,) in zip(problems, found, strict=True)])
