"""LoRA by its rank and its place beside full tuning: on telling classes of text, on arithmetic, and in memory.

    python experiments/studies/lora_rank.py [--seeds 3] [--parts memory classes arithmetic] [--rates 1e-3 3e-3 1e-2]

The claims: LoRA is within 1% of full tuning (Hu et al. 2021, arXiv:2106.09685, of classification), it stays behind on
mathematics (Biderman et al. 2024, arXiv:2405.09673), and it takes 70% less memory (Hu et al., of GPT-3: a third).

All arms begin with one small model, which has read the standard library's sources and word problems answered by a
guess, so that the problems' language is known and their arithmetic is not.

- `classes`: which of eight packages a piece of source of 96 tokens is from; modules that were read by no model are held
  out. The head is new, and whole in every arm.
- `arithmetic`: solutions with each step written down. Exact match on held-out problems; and what tuning costs the text
  that the model began with, in nats a token.
- `memory`: a step's state and gradients by shapes, for this model and Llama-2-7B's shape; and what XLA takes for the
  whole step of this model's.

Adapters are on all linear layers by rank, or with as many parameters as rank 4 has there on attention, on queries and
values, or (5% more) on the feed-forward layers; `lora_alpha` is twice the rank. Every arm has the best of --rates for
it by its first seed, on held-out data that is not reported. Seeds are of adapters, heads and orders of rows.

Prints a Markdown table for each part, differences to full tuning with the 95% interval of a bootstrap over held-out
pieces or problems. The plot has exact match and accuracy by rank.
"""

import argparse
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from common import Recipe, Rows, Trainer, cell, evaluate, make_parser, packed_rows, say, table
from loops import difference
from plot import lines
from small_policies import Answers, Ground, Params, Size, demonstrations, in_batches, problems
from tuner import Tuner, held

from llm_jax.adapters import LoraConfig
from llm_jax.adapters.scores import with_projection
from llm_jax.data.config import EmbeddedConfig
from llm_jax.data.embedded import stdlib_text
from llm_jax.data.embedded.problems import careless
from llm_jax.data.encode import Sequence as TokenSequence
from llm_jax.data.rows import fill_labelled_row, labelled_schema
from llm_jax.jobs.reward_terms import classes_objective
from llm_jax.jobs.scoring import run_rows
from llm_jax.jobs.terms import sft_objective
from llm_jax.models import Decoder, HeadConfig, Model, ModelConfig, bind, with_head
from llm_jax.training import Objective

CLASSES = ("asyncio", "email", "idlelib", "importlib", "lib2to3", "multiprocessing", "tkinter", "xml")
HELD_OUT = 4
"""One module of so many."""
PIECE = 96
FULL = "full"
LLAMA_2_7B = ModelConfig(
    vocab_size=32_000,
    hidden_size=4096,
    intermediate_size=11_008,
    num_layers=32,
    num_heads=32,
    max_position_embeddings=4096,
)


def lora(rank: int, *modules: str) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=2.0 * rank, target_modules=modules or "all-linear")


RANKS = {f"all, r {rank}": rank for rank in (1, 4, 16)}
ARMS: dict[str, LoraConfig | None] = {FULL: None} | {name: lora(rank) for name, rank in RANKS.items()}
ARMS |= {
    "attention, r 10": lora(10, "q_proj", "k_proj", "v_proj", "o_proj"),
    "queries and values, r 20": lora(20, "q_proj", "v_proj"),
    "feed-forward, r 7": lora(7, "gate_proj", "up_proj", "down_proj"),
}


@dataclass(frozen=True)
class Outcome:
    choosing: float
    """Share of right ones where rates are chosen."""
    correct: np.ndarray
    """bool[pieces or problems]: of those that are reported."""
    text: float = 0.0
    """Held-out loss of text, nats a token."""


def sources(held_out: bool) -> list[stdlib_text.Document]:
    return [one for one in stdlib_text.modules() if (stdlib_text.place(one.name) % HELD_OUT == 0) == held_out]


class Base:
    """The model that all arms begin with."""

    def __init__(self, small: bool):
        self.small = small
        config = EmbeddedConfig(max_number=12, min_operations=2, max_operations=3)
        size = Size(width=32, layers=1, demonstrations=500) if small else Size()
        read = [one.text for one in sorted(sources(False), key=lambda one: stdlib_text.place(one.name))]
        read = read[: 4 if small else 120]
        self.ground = Ground(config, lambda problem, chance: problem.careful, size, 160, 1024, read)
        text = self.text(read)
        guessed = demonstrations(config, lambda one, chance: careless(one, config, chance), size.demonstrations)
        guesses = self.ground.packed(guessed[: 2 * len(text["tokens"])])
        rows = {name: np.concatenate([x, guesses[name]]) for name, x in text.items()}
        self.unseen = self.text([one.text for one in sources(True)][: 2 if small else 20])
        self.unseen = {name: x[:128] for name, x in self.unseen.items()}
        recipe = Recipe(4 if small else 500, batch=16, rate=6e-3, looks=1)
        trained = Trainer(self.decoder.config, recipe)(rows, self.unseen, seed=0)
        self.params = trained.params
        say(f"base: {trained.loss:.3f} nats a token of text that it has not read")

    @property
    def decoder(self) -> Decoder:
        return self.ground.decoder

    def text(self, texts: list[str]) -> Rows:
        tokenizer = self.ground.tokenizer
        return packed_rows(tokenizer, [tokenizer.encode(one) + [tokenizer.eos_id] for one in texts], self.ground.window)

    def text_loss(self, params: Params) -> float:
        return evaluate(self.decoder, params, self.unseen)  # pyright: ignore[reportArgumentType]


class Classes:
    """Pieces of source by package."""

    def __init__(self, base: Base, steps: int):
        self.base, self.steps, self.batch = base, steps, 16
        head = HeadConfig(len(CLASSES), "mean")
        start = Model(base.decoder, base.params, base.decoder.config)
        self.headed = functools.cache(lambda seed: with_head(start, head, seed))
        self.decoder = self.headed(0).decoder
        self.train, held_out = (self._rows(some, most) for some, most in ((False, 300), (True, 100)))
        parity = np.arange(len(held_out["tokens"])) % 3 == 0
        self.choosing, self.reported = ({name: x[which] for name, x in held_out.items()} for which in (parity, ~parity))
        say(f"classes: {len(self.train['tokens'])} pieces, {len(self.reported['tokens'])} reported")

    def _rows(self, held_out: bool, most: int) -> Rows:
        """So many of a class at most, spread over its modules."""
        filled, tokenizer = [], self.base.ground.tokenizer
        schema, most = labelled_schema(PIECE, 1), 8 if self.base.small else most
        for label, package in enumerate(CLASSES):
            own = [one.text for one in sources(held_out) if one.name.startswith(f"{package}/")]
            pieces = [
                ids[i : i + PIECE] for ids in map(tokenizer.encode, own) for i in range(0, len(ids) - PIECE, PIECE)
            ]
            for i in np.random.default_rng(label).permutation(len(pieces))[:most]:
                piece = TokenSequence(np.array(pieces[i], np.int32), np.ones(PIECE, np.uint8))
                row = (len(filled), piece, {"label": label})
                filled.append(fill_labelled_row(schema, [row], tokenizer.token_bytes, tokenizer.pad_id, 0))
        names = ("tokens", "segment_ids", "positions", "loss_mask", "answer_index", "label")
        return {name: np.stack([row[name] for row in filled]) for name in names}

    def objective(self, decoder: Decoder) -> Objective:
        return classes_objective(decoder, steps=False)

    def adapter(self, config: LoraConfig) -> LoraConfig:
        return with_projection(config)

    def start(self, seed: int) -> Params:
        return self.headed(seed).params

    def outcome(self, params: Params) -> Outcome:
        choosing, reported = (
            in_batches(functools.partial(_guesses, self.decoder, params), rows) == rows["label"][:, 0]
            for rows in (self.choosing, self.reported)
        )
        return Outcome(float(choosing.mean()), reported)


@functools.partial(jax.jit, static_argnums=0)
def _guesses(decoder: Decoder, params: Params, rows: Any) -> jax.Array:
    """int32[B]: the likeliest class of each row's text."""
    bound = bind(decoder, params)
    return bound.scores(run_rows(bound, rows)[0], rows["segment_ids"], 1)[:, 0].argmax(-1)


class Arithmetic:
    """Word problems."""

    def __init__(self, base: Base, steps: int):
        self.base, self.steps, self.batch = base, steps, 16
        self.decoder, self.train = base.decoder, base.ground.rows
        self.choosing, self.reported = (
            problems(base.ground.config, name, 4 if base.small else count, "eval")
            for name, count in (("choosing", 150), ("reported", 400))
        )
        self.answers = Answers(base.ground, base.params)

    def objective(self, decoder: Decoder) -> Objective:
        return sft_objective(decoder)

    def adapter(self, config: LoraConfig) -> LoraConfig:
        return config

    def start(self, seed: int) -> Params:
        return self.base.params

    def outcome(self, params: Params) -> Outcome:
        choosing, reported = (self.answers.exact_match(params, some) for some in (self.choosing, self.reported))
        return Outcome(float(choosing.mean()), reported, self.base.text_loss(params))


TASKS = {"classes": Classes, "arithmetic": Arithmetic}


def tuned(options: argparse.Namespace, task: Any) -> Iterator[tuple[str, Tuner, float, list[Outcome]]]:
    """Each arm, its chosen rate and the seeds with it."""
    for name in options.arms:
        adapter = ARMS[name]
        tuner = Tuner(
            task.decoder,
            task.objective,
            None if adapter is None else task.adapter(adapter),
            task.steps,
            task.batch,
        )

        def of(rate: float, seed: int, tuner: Tuner = tuner) -> Outcome:
            return task.outcome(tuner(task.start(seed), task.train, rate, seed))

        first = {rate: of(rate, 0) for rate in options.rates}
        say(f"{name}: " + ", ".join(f"rate {rate:g} {one.choosing:.3f}" for rate, one in first.items()))
        rate = max(first, key=lambda rate: first[rate].choosing)
        yield name, tuner, rate, [first[rate], *(of(rate, seed) for seed in range(1, options.seeds))]


def task_table(options: argparse.Namespace, task: Any, what: str) -> tuple[str, dict[str, float]]:
    body, ends = [], {}
    before = task.outcome(task.start(0))
    body.append(["before", "", "", f"{before.correct.mean():.3f}", ""])
    if before.text:
        body[0].append(f"{before.text:.3f}")
    for name, tuner, rate, seeds in tuned(options, task):
        correct = ends[name] = np.stack([one.correct for one in seeds])
        beside = difference(correct, ends[FULL]) if FULL in ends and name != FULL else ""
        exact = cell(list(map(float, correct.mean(axis=1))))
        body.append([name, f"{tuner.trained:,}", f"{rate:g}", exact, beside])
        if before.text:
            body[-1].append(cell([one.text for one in seeds]))
        say(" | ".join(body[-1]))
    head = ["arm", "trained parameters", "learning rate", what, "beside full tuning"]
    head += ["text, nats a token"] if before.text else []
    return table(head, body), {name: float(correct.mean()) for name, correct in ends.items()}


def memory_table(options: argparse.Namespace, base: Base, task: Any) -> str:
    body, whole = [], {}
    published = Decoder(LLAMA_2_7B)
    for name in options.arms:
        adapter = ARMS[name]
        tuner = Tuner(task.decoder, task.objective, adapter, task.steps, task.batch)
        found = {
            "small": held(base.decoder, adapter, "float32"),
            "step": tuner.bytes(base.params, task.train),
            "float32": held(published, adapter, "float32"),
            "bfloat16": held(published, adapter, "bfloat16"),
        }
        whole = whole or found
        body.append([name, *(f"{_mega(found[key])} {_share(found[key], whole[key])}" for key in found)])
    head = ["arm", "this model, without activations", "its step, by XLA"]
    head += [f"Llama-2-7B's shape, without activations, {kind}" for kind in ("float32", "bfloat16")]
    return table(head, body)


def _mega(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _share(size: int, whole: int) -> str:
    return f"({size / whole - 1:+.1%})" if size != whole else ""


def main() -> None:
    parser = make_parser(__doc__, __file__, steps=250)
    parser.add_argument("--parts", nargs="+", choices=("memory", *TASKS), default=("memory", *TASKS))
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="of these alone")
    parser.add_argument("--rates", nargs="+", type=float, default=(1e-3, 3e-3, 1e-2))
    options = parser.parse_args()
    base = Base(options.scale == "test")
    curves = {}
    if "memory" in options.parts:
        print(memory_table(options, base, Arithmetic(base, options.steps)) + "\n", flush=True)
    for part, what in (("classes", "accuracy"), ("arithmetic", "exact match")):
        if part in options.parts:
            said, ends = task_table(options, TASKS[part](base, options.steps), what)
            print(said + "\n", flush=True)
            ranks = [(float(rank), ends[name]) for name, rank in RANKS.items() if name in ends]
            curves[f"{part}, LoRA"] = ranks
            curves[f"{part}, full"] = [(rank, ends[FULL]) for rank, _ in ranks]
    if curves:
        Path(options.svg).write_text(lines(curves, "rank on all linear layers; share of right ones", log_x=True))


if __name__ == "__main__":
    main()
