"""What every training job does around its objective: check, prepare, train, evaluate, export."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from llm_jax.adapters.config import LoraConfig
from llm_jax.adapters.loading import base_of, write_own
from llm_jax.adapters.peft_files import Adapter, write_adapter
from llm_jax.adapters.scores import of_scores, with_projection
from llm_jax.adapters.sites import Adaptation
from llm_jax.base import processes
from llm_jax.base.errors import UserError
from llm_jax.base.logging import log
from llm_jax.data import Loader, Prepared, Tokenizer, check_records, load_tokenizer
from llm_jax.data.checking import check_lengths
from llm_jax.data.examples import Kind
from llm_jax.data.prepare import MANIFEST, prepare
from llm_jax.data.rows import PAIR_COLUMNS
from llm_jax.jobs import running as means
from llm_jax.jobs.adapting import Adapting, check_adapter, with_loraplus
from llm_jax.jobs.balancing import PREFIX
from llm_jax.jobs.origin import Origin, check_tokenizer, origin, token_ids, write_architecture, write_generation_config
from llm_jax.jobs.regularization import check_of_model, check_regularization, frozen_patterns
from llm_jax.models import Decoder, Model, abstract_params, declarations, layout, regroup, save
from llm_jax.models.config import ModelConfig
from llm_jax.models.flops import training_flops_per_token
from llm_jax.models.saving import copy_tokenizer
from llm_jax.sharding import Plan, check_divides, make_plan, place, placed_batches, storage_shardings, to_first
from llm_jax.storage.atomic import write_atomically
from llm_jax.storage.remote import fetch, is_remote, local_copy, publish, to_path
from llm_jax.storage.workdir import Workdir
from llm_jax.training import (
    Objective,
    TrainingJob,
    abstract_state,
    evaluate,
    init_state,
    make_eval_step,
    make_optimizer,
    make_train_step,
    train,
    weights_in_use,
)
from llm_jax.training.config import TrainConfig
from llm_jax.training.loggers import check_logging
from llm_jax.training.loop import BatchSource, check_least, check_train_config
from llm_jax.training.optimizer import Optimizer, check_optimizer
from llm_jax.training.profile import profiled_steps

if TYPE_CHECKING:
    from llm_jax.jobs.graph import Node

Params = Mapping[str, Any]
Columns = Mapping[str, Mapping[str, np.ndarray]]
"""Further per-row arrays, by split (`train`, `eval`) and name."""
Hook = Callable[[Any], Mapping[str, float]]


class LiveRows(BatchSource, Protocol):
    """Rows that are made while it trains, of what the policy has become."""

    def __len__(self) -> int:
        """How many there are before they come again, for `epoch`."""
        ...

    def stepping(self, step: Callable[[Any, Any], Any], plan: Plan) -> Callable[[Any, Any], Any]:
        """A training step that takes what `iterate` gives, and hands `step` the rows."""
        ...


@dataclass(frozen=True)
class Setup:
    """What a training job has in hand before its first step."""

    node: "Node"
    config: Any
    workdir: Workdir
    plan: Plan
    tokenizer: Tokenizer
    decoder: Decoder
    """The model's own, without an adapter."""
    data: Prepared
    adapting: Adapting | None = None
    """The adapter that is trained in place of the model."""

    @property
    def policy(self) -> Decoder:
        """What objectives bind the trained parameters to."""
        return self.decoder if self.adapting is None else self.adapting.decoder

    def objective(self, objective: Objective, training: bool) -> Objective:
        """An objective of `policy` as one of what is trained."""
        return objective if self.adapting is None else self.adapting.objective(objective, training)

    @property
    def sources(self) -> list[str]:
        """What the rows' `source_id` number."""
        return self.data.train.manifest["sources"]

    @property
    def shardings(self) -> Params:
        """Where the masters of a model of this architecture lie between steps."""
        return storage_shardings(declarations(self.decoder), abstract_params(self.decoder), self.plan)


def check_training(node: "Node", kind: Kind) -> None:
    """What fields and files can tell before anything is built: mesh, numbers, records, and the parent's shapes."""
    config = node.config
    plan = make_plan(config.mesh, compute_dtype=config.train.compute_dtype)
    check_train_config(config.train, plan)
    check_optimizer(config.train.optimizer, config.train.steps)
    check_logging(config.logging)
    profiled_steps(config.profile, config.train.steps)
    check_regularization(config.train)
    check_adapter(adapter_of(config), config.train)
    if hasattr(config, "task_eval"):
        check_least(config.task_eval, "task_eval", {"problems": 0, "max_tokens": 1, "samples": 0})
    check_records(kind, config.data)
    parent = node.parents.get("init_from")
    if parent is not None and not hasattr(parent, "workdir"):
        source = origin(parent, "init_from")
        check_shapes(config, plan, source.model, scored=config.job == "reward")
        if (adapter := adapter_of(config)) is not None:
            Adaptation(Decoder(source.model), adapter)
        check_lengths(kind, config.data, load_tokenizer(source.tokenizer))


def check_shapes(config: Any, plan: Plan, model: ModelConfig, scored: bool = False) -> None:
    """Raises UserError for a model without logits of next tokens (that is not `scored`), where the mesh does not divide
    it, the window is longer than its positions, or it lacks what is to be trained (experts to balance, say)."""
    if not scored:
        model.check_predicts(config.job)
    check_divides(plan, model.cut_sizes())
    check_of_model(config.train, model)
    if config.data.window > model.max_position_embeddings:
        raise UserError(
            f"data.window={config.data.window} is longer than the model's {model.max_position_embeddings} positions"
        )


def prepare_child(node: "Node", kind: Kind) -> None:
    """Builds the rows of a job that starts from a model, with that model's tokenizer, and passes both on."""
    source = origin(node.parents["init_from"], "init_from")
    prepare_rows(node, kind, load_tokenizer(source.tokenizer), source.model, source)


def prepare_rows(
    node: "Node", kind: Kind, tokenizer: Tokenizer, model: ModelConfig, parent: Origin | None = None
) -> None:
    """Packs the rows, and leaves tokenizer, architecture and data summary in the workdir."""
    workdir, config = node.workdir, node.config
    check_tokenizer(model, tokenizer.vocab_size, "init_from")
    check_shapes(config, make_plan(config.mesh), model, scored=model.head.labels is not None)
    adapter = adapter_of(config)
    if adapter is not None and parent is not None:
        write_own(workdir, adapter, parent.path)
    # Groups are patterns on parameters: one that matches none is found here, before a parent trains.
    policy_optimizer(config.train, Decoder(model), adapter)
    data = packed_rows(node, kind, tokenizer)
    _tell_left_out(node.name, data)
    data.tokenizer.save(workdir.tokenizer)
    write_architecture(workdir, model, token_ids(tokenizer) if parent is None else parent.extra)
    write_generation_config(workdir.tokenizer, data.tokenizer, parent)
    write_atomically(workdir.data / "summary.json", json.dumps(data.summary | _passes(data, config.train), indent=1))


def _tell_left_out(name: str, data: Prepared) -> None:
    """Says how many records were cut or left out, and why; the numbers are in `data/summary.json` too."""
    reasons = {
        "truncated": "cut to fit the window",
        "dropped": "too long and left out",
        "identical": "with equal answers and left out",
        "blank": "with an empty answer and left out",
    }
    counts = {reason: sum(data.summary[side][n] for side in ("train", "eval")) for n, reason in reasons.items()}
    if any(counts.values()):
        whole = sum(data.summary[side]["documents"] for side in ("train", "eval"))
        log(f"{name}: of {whole} records {', '.join(f'{n} {reason}' for reason, n in counts.items() if n)}")


def _passes(data: Prepared, config: TrainConfig) -> dict[str, Any]:
    """How often training goes through each source of a mixture; said aloud, since one that runs out is repeated."""
    sources = {n: s for n, s in data.summary["train"]["sources"].items() if "share" in s}
    rows = config.steps * config.batch_size
    passes = {name: round(rows * source["share"] / source["rows"], 3) for name, source in sources.items()}
    if passes:
        shown = (f"{n} {s['share']:.1%} ({s['rows']} rows, {passes[n]:.2f} epochs)" for n, s in sources.items())
        log(f"mixture: {', '.join(shown)}")
    return {"epochs": passes} if passes else {}


def packed_rows(node: "Node", kind: Kind, tokenizer: Tokenizer) -> Prepared:
    """The rows of a run, made where there are none yet.

    They are local files: those of a remote workdir are made and read in the local cache, and stored and brought whole.
    """
    folder = node.workdir.data
    copy = local_copy(folder, node.hash)
    fetch(folder, copy, MANIFEST)
    rows = prepare(kind, node.config.data, tokenizer, copy, packed_sets(node, copy))
    publish(copy, folder, MANIFEST)
    return rows


def pairs_have(rows: Prepared, name: str) -> bool:
    """Whether a pair has a number of its own (`rows.PAIR_COLUMNS`) that says something."""
    for side in (rows.train, rows.eval):
        columns = side.columns("pair_index", name)
        said = columns[name][columns["pair_index"] >= 0]
        if (~np.isnan(said) & (said != PAIR_COLUMNS[name])).any():
            return True
    return False


def packed_sets(node: "Node", own: epath.Path) -> epath.Path:
    """Where packed sets lie: beside all of `runs/`, to be shared; with its own data where a run lies elsewhere."""
    path = node.workdir.path
    if node.config.data.cache_dir is not None:
        return to_path(node.config.data.cache_dir, f"data.cache_dir={node.config.data.cache_dir}")
    return path.parent / "data" if path.name == f"{node.name}-{node.hash}" and not is_remote(path) else own


def setup(node: "Node", kind: Kind) -> Setup:
    """Opens what `prepare` left in the workdir."""
    config, workdir = node.config, node.workdir
    here = origin(node, "workdir", own=True)
    tokenizer = load_tokenizer(here.tokenizer)
    plan = make_plan(config.mesh, compute_dtype=config.train.compute_dtype)
    decoder = Decoder(here.model, remat=config.train.remat)
    rows, adapter = packed_rows(node, kind, tokenizer), adapter_of(config)
    adapting = None if adapter is None else Adapting.of(decoder, adapter)
    return Setup(node, config, workdir, plan, tokenizer, decoder, rows, adapting)


def adapter_of(config: Any) -> LoraConfig | None:
    """The adapter that a job's configuration asks for; None of jobs that train whole models only. Scores come with it
    where they are what is trained."""
    adapter = getattr(config, "adapter", None)
    return with_projection(adapter) if adapter is not None and config.job == "reward" else adapter


def fit(
    s: Setup,
    objective: Objective,
    policy: Callable[[], Params],
    *,
    evaluation: Objective,
    running: bool = False,
    frozen: Callable[[], Params] = dict,
    frozen_decoders: Mapping[str, Decoder] | None = None,
    columns: Columns | None = None,
    live: LiveRows | None = None,
    finish: tuple[Hook, ...] = (),
) -> None:
    """Trains the role `policy` on an objective, then exports it.

    Where the run has an adapter it is the adapter that is trained and exported, and the model is frozen.

    Args:
      s: from `setup`.
      objective: from `jobs.terms`, of `s.policy`.
      evaluation: the same, as held-out rows are scored: without what is added in training only.
      policy: the model's parameters at first; called only where there is no checkpoint, or an adapter is trained.
      running: whether the objective carries means over batches (`jobs/running.py`).
      frozen: parameters of further roles, by role, likewise.
      frozen_decoders: their architectures.
      columns: further arrays that the rows carry, such as a reference's log-probabilities.
      live: trained on in place of the rows of `s.data.train`.
      finish: run once after the last step.
    """
    config = s.config.train
    adapting = s.adapting
    declared, frozen_abstract = {"policy": declarations(s.decoder)}, {}
    abstract: dict[str, Any] = {"policy": abstract_params(s.decoder)}
    if adapting is not None:
        declared, frozen_abstract = adapting.declarations, adapting.abstract_frozen(s.plan)
        abstract = {"policy": adapting.adaptation.abstract}
        objective, evaluation = s.objective(objective, training=True), s.objective(evaluation, training=False)
    for role, decoder in (frozen_decoders or {}).items():
        declared[role], frozen_abstract[role] = declarations(decoder), abstract_params(decoder)
    carried: Params = {means.ROLE: means.nothing_yet()} if running else {}
    if running:
        declared[means.ROLE], abstract[means.ROLE] = means.DECLARATIONS, means.abstract()
    optimizer, averaged = (
        policy_optimizer(config, s.decoder, adapter_of(s.config), running),
        config.ema_decay is not None,
    )
    loaders = {}
    for split, rows in (("train", s.data.train), ("eval", s.data.eval)):
        training = split == "train"
        loaders[split] = Loader(rows, config.batch_size, config.microbatches, config.seed, shuffle=training)
        for name, array in (columns or {}).get(split, {}).items():
            loaders[split].extra(name, array)
    eval_step = make_eval_step(evaluation, s.plan, declared)

    def held_out(state: Any) -> dict[str, float]:
        batches = placed_batches(loaders["eval"], s.plan, 0, min(config.eval_batches, len(loaders["eval"])))
        values = evaluate(eval_step, evaluation, state, batches)
        return {_eval_name(name): value for name, value in values.items() if _is_told(name)}

    def initial() -> Any:
        first = policy()
        if adapting is None:
            return init_state({"policy": first, **carried}, optimizer, declared, s.plan, frozen=frozen(), ema=averaged)
        trained = {"policy": adapting.init(first, config.seed), **carried}
        fixed = {**adapting.frozen(first, s.plan), **frozen()}
        return init_state(trained, optimizer, declared, s.plan, frozen=fixed, ema=averaged)

    like = abstract_state(abstract, optimizer, declared, s.plan, frozen=frozen_abstract, ema=averaged)

    def frozen_again() -> Any:
        assert adapting is not None
        fixed = {**adapting.frozen(policy(), s.plan), **frozen()}
        return place(fixed, jax.tree.map(lambda leaf: leaf.sharding, like["frozen"]))

    def export(state: Any) -> Mapping[str, float]:
        if config.checkpoint.export and adapting is not None:
            trained = to_first(weights_in_use(state)["policy"])
            processes.from_first(lambda: export_adapter(s, trained))
        elif config.checkpoint.export:
            extra = origin(s.node, "workdir", own=True).extra
            policy = to_first(weights_in_use(state)["policy"])
            model = Model(s.decoder, policy, s.decoder.config, s.workdir.tokenizer, extra=extra)
            processes.from_first(lambda: save(model, s.workdir.export))
        return {}

    step = make_train_step(objective, optimizer, s.plan, declared, seed=config.seed, ema_decay=config.ema_decay)
    train(
        TrainingJob(
            name=s.node.name,
            workdir=s.workdir,
            config=config,
            plan=s.plan,
            abstract_state=like,
            made_again={} if adapting is None else {"frozen": frozen_again},
            init=initial,
            train_step=step if live is None else live.stepping(step, s.plan),
            loader=loaders["train"] if live is None else live,
            rows=len(s.data.train if live is None else live),
            evaluate=held_out,
            finish=(*finish, export),
            layout=layout(s.decoder),
            regroup=regroup,
            logging=s.config.logging,
            profile=s.config.profile,
            flops_per_token=_flops(s),
        )
    )


def _flops(s: Setup) -> float:
    """Of a training step, per token. A frozen weight takes no gradient: with an adapter one of the three products of
    each falls away, beside which the adapter's own are few."""
    whole = training_flops_per_token(s.decoder.config, s.config.data.window, s.config.train.mtp_weight > 0)
    return whole if s.adapting is None else whole * 2 / 3


def _is_told(name: str) -> bool:
    """Whether an evaluation has a metric too; how full each single expert was, training says."""
    return name != "num_tokens" and not name.startswith(f"{PREFIX}load/")


def _eval_name(name: str) -> str:
    """As TRL names the loss on one of several evaluation sets: `eval_NAME_loss`."""
    source = name.removeprefix("loss_")
    return f"eval_{name}" if source == name else f"eval_{source}_loss"


def export_adapter(s: Setup, trained: Params) -> None:
    """The PEFT folder of a trained adapter, with the tokenizer of the model, which it names as a Hugging Face folder
    where there is one."""
    assert s.adapting is not None
    base = base_of(s.workdir.path)
    whole = Workdir(base).export
    base = str(whole if (whole / "config.json").exists() else base)
    adaptation = s.adapting.adaptation
    scores = of_scores(origin(s.node, "workdir", own=True).extra)
    write_adapter(s.workdir.export, adaptation, Adapter(adaptation.config, dict(trained), scores=scores), {}, base)
    copy_tokenizer(s.workdir.tokenizer, s.workdir.export)


def policy_optimizer(
    config: TrainConfig, decoder: Decoder, adapter: LoraConfig | None = None, running: bool = False
) -> Optimizer:
    """The optimizer of the role `policy`: of a model, or of an adapter on it. `running`: means are carried beside it.
    Raises UserError as `make_optimizer` and `Adaptation`."""
    layouts = {"policy": layout(decoder)}
    carried = {means.ROLE: means.DECLARATIONS} if running else {}
    if adapter is not None:
        declared = {"policy": Adaptation(decoder, adapter).declarations, **carried}
        rules = with_loraplus(config.optimizer, adapter)
        return make_optimizer(rules, declared, config.steps, freeze=config.freeze, layouts=layouts)
    declared = {"policy": declarations(decoder), **carried}
    freeze = frozen_patterns(config, decoder.config)
    return make_optimizer(config.optimizer, declared, config.steps, freeze=freeze, layouts=layouts)


def policy_of(state: Any, adapting: Adapting | None = None) -> Params:
    """The trained model's parameters (their average, where there is one), on the default device of process 0, for
    evaluations that do not use the mesh; with an adapter those of the model with it in its weights.

    All processes call it; the others get leaves of None.
    """
    trained = weights_in_use(state)
    if adapting is None:
        return jax.device_put(to_first(trained["policy"]), jax.local_devices()[0])
    whole = jax.jit(adapting.merged)(trained, state["frozen"])
    whole = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), whole)
    return jax.device_put(to_first(whole), jax.local_devices()[0])
