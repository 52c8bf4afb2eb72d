"""The job `reward`: a model that scores answers, ranks them, tells classes of texts, or judges step by step."""

import dataclasses
from typing import TYPE_CHECKING, Any

from llm_jax.adapters.loading import load_merged
from llm_jax.base.errors import UserError
from llm_jax.data import load_tokenizer
from llm_jax.data import source_manifest as data_manifest
from llm_jax.data.checking import check_classes
from llm_jax.data.examples import PAIRED, Kind
from llm_jax.jobs.config import RewardConfig
from llm_jax.jobs.fit import fit
from llm_jax.jobs.origin import Origin, origin
from llm_jax.jobs.regularization import NONE, Regularization, regularization
from llm_jax.jobs.reward_terms import classes_objective, pairs_objective, rankings_objective
from llm_jax.jobs.setup import Setup, check_training, packed_rows, pairs_have, prepare_rows, setup
from llm_jax.models import HeadConfig, family, with_head
from llm_jax.models.config import ModelConfig
from llm_jax.models.families.heads import LABELS, PAIRWISE
from llm_jax.training import Objective

if TYPE_CHECKING:
    from llm_jax.jobs.graph import Node

KINDS: dict[str, Kind] = {"pairs": "preference", "rankings": "ranking", "classify": "labelled", "steps": "steps"}
READS = {
    "pairwise": ("pairs",),
    "center_rewards_coefficient": ("pairs",),
    "ranking_loss": ("rankings",),
    "num_labels": ("classify", "steps"),
    "label_names": ("classify", "steps"),
    "pooling": ("pairs", "rankings", "classify"),
}
"""Which tasks read a field."""


def kind_of(config: RewardConfig) -> Kind:
    """What the records are."""
    return "compared" if config.pairwise else KINDS[config.task]


def source_manifest(config: RewardConfig) -> dict[str, Any]:
    """Content hashes of the records."""
    return data_manifest(kind_of(config), config.data)


def check(node: "Node") -> None:
    """Everything that fields and files can tell. Raises UserError."""
    config: RewardConfig = node.config
    if config.init_from is None:
        raise UserError("init_from is not set: reward needs a model to start from")
    for name, tasks in READS.items():
        default = next(f.default for f in dataclasses.fields(config) if f.name == name)
        if getattr(config, name) != default and config.task not in tasks:
            raise UserError(f"{name}={getattr(config, name)} is set, but task={config.task} does not read it")
    coefficient = config.center_rewards_coefficient
    if coefficient is not None and not 0 <= coefficient < float("inf"):
        raise UserError(f"center_rewards_coefficient is {coefficient}; it must be a number of at least 0, or None")
    if config.pairwise and coefficient:
        raise UserError("center_rewards_coefficient is for scores of answers; pairwise=True compares them")
    if config.num_labels < 2:
        raise UserError(f"num_labels is {config.num_labels}; there have to be 2 classes or more")
    if config.label_names and len(set(config.label_names)) != config.num_labels:
        raise UserError(f"label_names={config.label_names} are not {config.num_labels} different names")
    if config.pooling == "mean" and config.train.checkpoint.export:
        raise UserError(
            "pooling=mean is of no class of transformers, so there is no folder to export: set"
            " train.checkpoint.export=False, and use the workdir itself"
        )
    if config.data.share_prompts and config.pooling != "last":
        raise UserError(f"data.share_prompts: pooling={config.pooling} reads prompts, not an answer's last token alone")
    for name in ("mtp_weight", "z_loss"):
        if getattr(config.train, name):
            raise UserError(f"train.{name}={getattr(config.train, name)} is of predicted tokens, and reward has scores")
    check_training(node, kind_of(config))
    if config.task in ("classify", "steps"):
        check_classes(kind_of(config), config.data, config.num_labels)


def prepare(node: "Node") -> None:
    """Renders and packs the records with the parent's tokenizer."""
    source = origin(node.parents["init_from"], "init_from")
    tokenizer = load_tokenizer(source.tokenizer)
    model = headed(node.config, source.model)
    extra = {name: value for name, value in source.extra.items() if name not in (PAIRWISE, *LABELS)}
    # transformers finds a text's last token by this id, and scores were learned at the one before it.
    extra |= {"pad_token_id": tokenizer.pad_id}
    names = node.config.label_names
    if names:
        extra |= {"id2label": {str(i): n for i, n in enumerate(names)}, "label2id": {n: i for i, n in enumerate(names)}}
    if node.config.pairwise:
        extra[PAIRWISE] = True
    if node.config.train.checkpoint.export:
        family(model.family).to_hf(model, extra)
    kind, data = kind_of(node.config), node.config.data
    prepare_rows(node, kind, tokenizer, model, Origin(source.path, source.tokenizer, model, extra))
    own = kind in PAIRED and (data.path is not None or bool(data.mixture))
    if own and pairs_have(packed_rows(node, kind, tokenizer), "label_smoothing"):
        raise UserError("records have a `label_smoothing`, which reward does not read (preference does)")


def headed(config: RewardConfig, model: ModelConfig) -> ModelConfig:
    """The architecture with scores at its end. Raises UserError for a model that ends in another number of them."""
    labels = 1 if config.task in ("pairs", "rankings") else config.num_labels
    before = model.head.labels
    if before not in (None, labels):
        raise UserError(f"init_from={config.init_from} ends in {before} scores, and task={config.task} has {labels}")
    if before is None and not model.causal:
        raise UserError(f"init_from={config.init_from} is an encoder without scores, whose head is not known")
    steps = config.task == "steps"
    head = HeadConfig(labels, "none" if steps else config.pooling, bias=steps)
    if before is not None:
        head = dataclasses.replace(model.head, pooling=head.pooling if model.causal else model.head.pooling)
    return dataclasses.replace(model.resolved().without_further(), head=head)


def run(node: "Node") -> None:
    """Trains from the parent's weights and a head drawn by `train.seed`."""
    s = setup(node, kind_of(node.config))
    parent = origin(node.parents["init_from"], "init_from")

    def policy() -> Any:
        model = load_merged(parent.path, mesh=s.config.mesh)
        return with_head(model, s.decoder.config.head, s.config.train.seed).params

    fit(
        s,
        reward_objective(s, regularization(s.config.train, s.decoder.config)),
        policy,
        evaluation=reward_objective(s),
    )


def reward_objective(s: Setup, extra: Regularization = NONE) -> Objective:
    """The task's objective."""
    config: RewardConfig = s.config
    common = s.tokenizer.pad_id, extra, s.sources
    match config.task:
        case "pairs":
            return pairs_objective(s.policy, config.center_rewards_coefficient, *common)
        case "rankings":
            return rankings_objective(s.policy, config.ranking_loss, *common)
        case _:
            return classes_objective(s.policy, config.task == "steps", *common)
