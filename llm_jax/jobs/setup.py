"""What every training job does before its first step: checks, rows, and what it then has in hand."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath

from llm_jax.adapters.config import LoraConfig
from llm_jax.adapters.loading import write_own
from llm_jax.adapters.scores import with_projection
from llm_jax.adapters.sites import Adaptation
from llm_jax.base.errors import UserError
from llm_jax.base.logging import log
from llm_jax.data import Prepared, Tokenizer, check_records, load_tokenizer
from llm_jax.data.checking import check_lengths
from llm_jax.data.examples import Kind
from llm_jax.data.prepare import MANIFEST, prepare
from llm_jax.data.rows import PAIR_COLUMNS
from llm_jax.jobs import running as means
from llm_jax.jobs.adapting import Adapting, check_adapter, with_loraplus
from llm_jax.jobs.origin import Origin, check_tokenizer, origin, token_ids, write_architecture, write_generation_config
from llm_jax.jobs.regularization import check_of_model, check_regularization, frozen_patterns
from llm_jax.models import Decoder, abstract_params, declarations, layout
from llm_jax.models.config import ModelConfig
from llm_jax.sharding import Plan, check_divides, make_plan, storage_shardings
from llm_jax.storage.atomic import write_atomically
from llm_jax.storage.remote import fetch, is_remote, local_copy, publish, to_path
from llm_jax.storage.workdir import Workdir
from llm_jax.training import Objective, make_optimizer
from llm_jax.training.config import TrainConfig
from llm_jax.training.loggers import check_logging
from llm_jax.training.loop import check_least, check_train_config
from llm_jax.training.optimizer import Optimizer, check_optimizer
from llm_jax.training.profile import profiled_steps

if TYPE_CHECKING:
    from llm_jax.jobs.graph import Node

Params = Mapping[str, Any]


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
    if config.data.share_prompts and config.train.neftune_noise_alpha is not None:
        raise UserError("data.share_prompts: train.neftune_noise_alpha is for tokens of one document, not of two")
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
    it, the window is longer than its positions, its texts have prefixes and it reads none or the other way round, its
    documents cannot share a prompt, or it lacks what is to be trained (experts to balance, say)."""
    if not scored:
        model.check_predicts(config.job)
    check_divides(plan, model.cut_sizes())
    check_of_model(config.train, model)
    if config.data.share_prompts:
        _check_sharing(model)
    if config.job == "pretrain" and config.data.random_prefix != model.prefix_lm:
        raise UserError(
            f"data.random_prefix={config.data.random_prefix} and model.prefix_lm={model.prefix_lm}: a prefix language "
            "model is trained on texts with a prefix, and no other is"
        )
    if config.data.window > model.max_position_embeddings:
        raise UserError(
            f"data.window={config.data.window} is longer than the model's {model.max_position_embeddings} positions"
        )


def _check_sharing(model: ModelConfig) -> None:
    try:
        model.resolved().check_visible()
    except UserError as error:
        raise UserError(f"data.share_prompts: {error}") from None


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
