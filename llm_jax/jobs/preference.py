"""The job `preference`: direct preference optimization of a policy against a frozen reference, on packed pairs."""

from typing import TYPE_CHECKING, Any

from llm_jax.adapters.loading import load_merged
from llm_jax.base.errors import UserError
from llm_jax.data import load_tokenizer
from llm_jax.data import source_manifest as data_manifest
from llm_jax.jobs.config import PreferenceConfig
from llm_jax.jobs.fit import check_training, fit, prepare_child, setup
from llm_jax.jobs.origin import origin
from llm_jax.jobs.reference import stored_logps
from llm_jax.jobs.regularization import NONE, Regularization, regularization
from llm_jax.jobs.terms import dpo_objective
from llm_jax.jobs.word_problems import problem_hook
from llm_jax.models import Decoder
from llm_jax.training import Objective

if TYPE_CHECKING:
    from llm_jax.jobs.graph import Node


def source_manifest(config: PreferenceConfig) -> dict[str, Any]:
    """Content hashes of the pairs."""
    return data_manifest("preference", config.data)


def check(node: "Node") -> None:
    """Everything that fields and files can tell. Raises UserError."""
    config: PreferenceConfig = node.config
    if config.init_from is None:
        raise UserError("init_from is not set: preference needs a policy to align")
    if not config.beta > 0:
        raise UserError(f"beta is {config.beta}; it must be positive")
    if not 0 <= config.label_smoothing < 0.5:
        raise UserError(f"label_smoothing is {config.label_smoothing}; it must be at least 0 and below 0.5")
    if config.train.mtp_weight:
        raise UserError(
            f"train.mtp_weight={config.train.mtp_weight} is for pretrain and sft, which predict all targets"
        )
    check_training(node, "preference")


def prepare(node: "Node") -> None:
    """Renders and packs the pairs with the policy's tokenizer, which has to be the reference's too."""
    prepare_child(node, "preference")
    if "reference" in node.parents:
        parent = origin(node.parents["reference"], "reference")
        parent.model.check_predicts("reference")
        reference = load_tokenizer(parent.tokenizer)
        policy = load_tokenizer(origin(node.parents["init_from"], "init_from").tokenizer)
        if reference.fingerprint != policy.fingerprint:
            raise UserError(f"reference={node.config.reference} has another tokenizer than init_from")


def run(node: "Node") -> None:
    """Trains the policy, and answers word problems before and after."""
    s = setup(node, "preference")
    config: PreferenceConfig = node.config
    policy = origin(node.parents["init_from"], "init_from")
    reference = origin(node.parents["reference"], "reference") if "reference" in node.parents else policy
    loss = (config.beta, config.label_smoothing, config.reference_logps)
    live = config.reference_logps == "live"
    # With an adapter the model without it is the reference: no second copy of its weights.
    apart = live and (s.adapting is None or reference is not policy)

    def frozen() -> dict[str, Any]:
        return {"ref": load_merged(reference.path, mesh=config.mesh).params} if apart else {}

    def objective(extra: Regularization = NONE) -> Objective:
        return dpo_objective(s.policy, *loss, extra, s.sources, Decoder(reference.model))

    fit(
        s,
        objective(regularization(config.train, s.decoder.config)),
        lambda: load_merged(policy.path, mesh=config.mesh).params,
        evaluation=objective(),
        frozen=frozen,
        frozen_decoders={"ref": Decoder(reference.model)} if apart else None,
        columns=None if live else stored_logps(s, reference),
        finish=(problem_hook(s, before=policy),),
    )
