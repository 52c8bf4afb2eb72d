"""The job `rounds`: a policy answers prompts, pairs are made of its answers and trained on; then the next round.

    WORKDIR/rounds/00/eval.json      held-out prompts, answered by the policy it begins with
    WORKDIR/rounds/01/pairs.jsonl    the pairs of round 1 (`alignment.making` has how they come to be)
    WORKDIR/rounds/01/run/           its training: a run of the job `preference`, with its own report
    WORKDIR/rounds/01/eval.json      held-out prompts, answered after it
    WORKDIR/checkpoints/, export/    of the last round's policy

Of online DPO there is one round, whose `pairs.jsonl` is what its training is evaluated on; those it trains on are in
`rounds/01/online/`, a chunk for each time the policy was asked.

What is there is never made a second time: a run that was killed goes on with the chunk it was sampling, or with the
step after its training's last save, and ends as if it had not been, bit for bit.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from llm_jax.base.errors import UserError
from llm_jax.base.logging import log
from llm_jax.data import load_tokenizer
from llm_jax.data import source_manifest as data_manifest
from llm_jax.data.chat import with_template
from llm_jax.jobs.adapting import Adapting
from llm_jax.jobs.alignment.checks import check_rounds, check_texts, function_hash, round_config
from llm_jax.jobs.alignment.evaluation import evaluated, held_out
from llm_jax.jobs.alignment.making import ChunkStore, PairMaker, make_pairs, prompt_seed, summed
from llm_jax.jobs.alignment.methods import pair_maker, scored
from llm_jax.jobs.alignment.online import OnlineRows
from llm_jax.jobs.alignment.policies import Policies, publish_model
from llm_jax.jobs.alignment.prompts import share_of, training_prompts
from llm_jax.jobs.alignment.scorers import open_scorer
from llm_jax.jobs.config import RoundsConfig
from llm_jax.jobs.origin import origin, write_architecture, write_generation_config
from llm_jax.jobs.preference import train_preference
from llm_jax.models import Decoder
from llm_jax.storage.atomic import write_atomically
from llm_jax.storage.json_files import read_json
from llm_jax.training.metrics import read_metrics
from llm_jax.training.report import write_report

if TYPE_CHECKING:
    from etils import epath

    from llm_jax.jobs.graph import Node

    Parent = Node | epath.Path


def source_manifest(config: RoundsConfig) -> dict[str, Any]:
    """Content hashes of the prompts, and of the file of a scoring function."""
    return {"prompts": data_manifest("preference", config.data)} | function_hash(config.scorer)


def check(node: "Node") -> None:
    """Everything that fields and files can tell. Raises UserError."""
    check_rounds(node)


def prepare(node: "Node") -> None:
    """Leaves the policy's tokenizer and architecture in the workdir, and checks that the prompts fit it."""
    source, workdir, data = origin(node.parents["init_from"], "init_from"), node.workdir, node.config.data
    tokenizer = with_template(load_tokenizer(source.tokenizer), data.chat_template)
    check_texts(node, source, tokenizer)
    tokenizer.save(workdir.tokenizer)
    write_architecture(workdir, source.model, source.extra)
    write_generation_config(workdir.tokenizer, tokenizer, source)


def run(node: "Node") -> None:
    """Goes through the rounds, and makes the last one's policy its own."""
    config: RoundsConfig = node.config
    policies = Policies(node, load_tokenizer(node.workdir.tokenizer))
    policy: Parent = node.parents["init_from"]
    lines = [_evaluate(node, policies, policy, 0)]
    for number in range(1, config.rounds + 1):
        counts = _pairs(node, policies, policy, number)
        policy = last = _train(node, policies, policy, number)
        if config.method == "online_dpo":
            counts = summed(_online_store(node).all())
        found = _round_metrics(counts) | _last_metrics(last) | _evaluate(node, policies, policy, number)
        lines.append(found)
        write_metrics(node, lines)
        log(f"{node.name}: round {number} of {config.rounds}: {_shown(found)}")
        if number == config.rounds:
            publish_model(node, last)
    write_metrics(node, lines)


def round_folder(node: "Node", number: int) -> "epath.Path":
    """Where a round keeps its things."""
    return node.workdir.path / "rounds" / f"{number:02d}"


def _pairs(node: "Node", policies: Policies, policy: "Parent", number: int) -> Mapping[str, float]:
    """The pairs of a round, made if they are not there; their counts."""
    store = ChunkStore(round_folder(node, number))
    if not store.pairs.exists():
        _make_pairs(node, policies, policy, store, number)
    counts = summed(store.all())
    if len(set(store.pairs.read_text().splitlines())) < 2:
        said = ", ".join(f"{name} {value:g}" for name, value in counts.items())
        raise UserError(f"round {number} came to {counts['pairs']:g} pairs, and training needs two: {said}")
    return counts


def _make_pairs(node: "Node", policies: Policies, policy: "Parent", store: ChunkStore, number: int) -> None:
    config: RoundsConfig = node.config
    prompts = share_of(training_prompts(config), number, config.prompts_per_round, config.rounds)
    before = range(max(1, number - config.keep_rounds), number)
    earlier = [record for n in before for made in ChunkStore(round_folder(node, n)).all() for record in made.records]
    with _maker(node, policies) as maker:
        seed = prompt_seed(config.seed, number, "round")
        make_pairs(store, prompts, config.chunk, maker, lambda: policies.of(policy), seed, earlier)


@contextmanager
def _maker(node: "Node", policies: Policies) -> Iterator[PairMaker]:
    """The method's maker with its scorer, where it has one."""
    config: RoundsConfig = node.config
    with ExitStack() as stack:
        scorer = None
        if scored(config):
            judge = node.parents.get("scorer.model")
            source = None if judge is None else origin(judge, "scorer.model")
            scorer = stack.enter_context(open_scorer(config.scorer, source))
        yield pair_maker(config, policies.tokenizer, scorer)


def _train(node: "Node", policies: Policies, policy: "Parent", number: int) -> "Node":
    """The round's training, a run of its own."""
    from llm_jax.jobs import graph

    folder = round_folder(node, number)
    config = round_config(node.config, str(origin(policy, "init_from").path), folder / "pairs.jsonl")
    child = graph.make_node(f"{node.name}-round{number}", "preference", config, {"init_from": policy}, folder / "run")
    if not child.is_done():
        graph.refuse_changes(child.workdir, child.record())
        online = node.config.method == "online_dpo"
        graph.make([child], (lambda child: _train_online(node, policies, child)) if online else None)
    return child


def _train_online(node: "Node", policies: Policies, child: "Node") -> None:
    config: RoundsConfig = node.config
    with _maker(node, policies) as maker:
        seed = prompt_seed(config.seed, 1, "online")
        adapter, model = config.preference.adapter, origin(child, "workdir", own=True).model
        adapting = None if adapter is None else Adapting.of(Decoder(model), adapter)
        rows = OnlineRows(config, training_prompts(config), _online_store(node), maker, policies, seed, adapting)
        train_preference(child, rows)


def _online_store(node: "Node") -> ChunkStore:
    return ChunkStore(round_folder(node, 1) / "online")


def _evaluate(node: "Node", policies: Policies, policy: "Parent", number: int) -> dict[str, float]:
    """What the policy after a round says to the held-out prompts; asked once, and kept."""
    prompts = held_out(node.config)
    file = round_folder(node, number) / "eval.json"
    if not prompts:
        return {}
    if not file.exists():
        found = evaluated(policies.of(policy), policies.tokenizer, prompts, node.config.task_eval.max_tokens)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(found, ensure_ascii=False, indent=1))
    return read_json(file)["metrics"]


def _round_metrics(counts: Mapping[str, float]) -> dict[str, float]:
    """Counts of a round as its line of metrics.jsonl has them: `pairs/…`, and the mean score of the samples."""
    found = {f"pairs/{name}": value for name, value in counts.items() if name not in ("score_sum", "scored")}
    if counts.get("scored"):
        found["reward"] = counts["score_sum"] / counts["scored"]
    return found


def _last_metrics(child: "Node") -> dict[str, float]:
    """The last values of a training's metrics."""
    last = {name: value for line in read_metrics(child.workdir.metrics) for name, value in line.items()}
    return {name: value for name, value in last.items() if name not in ("step", "epoch") and "perf/" not in name}


def write_metrics(node: "Node", lines: list[dict[str, float]]) -> None:
    """metrics.jsonl with a line per round, whose number is its step; samples before and after, searched trees of
    the last round; the report."""
    text = "".join(json.dumps({"step": number} | line) + "\n" for number, line in enumerate(lines) if line)
    write_atomically(node.workdir.metrics, text)
    first, last = (round_folder(node, number) / "eval.json" for number in (0, len(lines) - 1))
    shown = []
    if last.exists():
        for before, after in zip(read_json(first)["answers"], read_json(last)["answers"], strict=True):
            shown.append({"prompt": after["prompt"], "answer": after["answer"]})
            shown[-1] |= {"before": before["completion"], "after": after["completion"]}
    trees = [note for made in ChunkStore(last.parent).all() for note in made.notes if "tree" in note]
    if trees := trees[: node.config.task_eval.samples]:
        write_atomically(node.workdir.trees, "".join(json.dumps(note, ensure_ascii=False) + "\n" for note in trees))
    rows = shown[: node.config.task_eval.samples]
    write_atomically(node.workdir.samples, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_report(node.workdir)


def _shown(line: Mapping[str, float]) -> str:
    names = ("pairs/pairs", "reward", "rewards/accuracies", "eval_exact_match")
    return ", ".join(f"{name} {line[name]:.4g}" for name in names if name in line)
