"""The job `preference`: any loss of the DPO family, on packed pairs or on unpaired answers, against a reference."""

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from llm_jax.adapters.loading import load_merged
from llm_jax.base.errors import UserError
from llm_jax.data import load_tokenizer
from llm_jax.data import source_manifest as data_manifest
from llm_jax.data.checking import check_numbers
from llm_jax.jobs.config import PreferenceConfig
from llm_jax.jobs.fit import LiveRows, fit
from llm_jax.jobs.origin import origin
from llm_jax.jobs.paired import paired_objective
from llm_jax.jobs.preference_loss import PreferenceLoss, preference_loss
from llm_jax.jobs.reference import stored_logps, synchronised
from llm_jax.jobs.regularization import regularization
from llm_jax.jobs.samples import sample_hook
from llm_jax.jobs.scoring import answer_logps, unpaired_logps
from llm_jax.jobs.setup import check_training, packed_rows, pairs_have, prepare_child, setup
from llm_jax.jobs.unpaired import unpaired_objective
from llm_jax.jobs.word_problems import problem_hook
from llm_jax.models import Decoder

if TYPE_CHECKING:
    from llm_jax.jobs.graph import Node


def source_manifest(config: PreferenceConfig) -> dict[str, Any]:
    """Content hashes of the pairs, or of the answers."""
    return data_manifest(preference_loss(config).kind, config.data)


def check(node: "Node") -> None:
    """Everything that fields and files can tell. Raises UserError."""
    config: PreferenceConfig = node.config
    loss = checked_loss(config)
    check_training(node, loss.kind)
    if not any(hasattr(parent, "workdir") for parent in node.parents.values()):
        check_reference(node)
    check_numbers(config.data, loss.columns, ", ".join(term.name for term in loss.terms if term.named.scores))


def checked_loss(config: PreferenceConfig) -> PreferenceLoss:
    """The losses, once all fields but those of data and training are known to be right. Raises UserError."""
    if config.init_from is None:
        raise UserError("init_from is not set: preference needs a policy to align")
    if config.train.mtp_weight:
        raise UserError(
            f"train.mtp_weight={config.train.mtp_weight} is for pretrain and sft, which predict all targets"
        )
    loss = preference_loss(config)
    whole = next((term.name for term in loss.terms if term.named.nll == "sequence"), None)
    if config.data.share_prompts and whole is not None:
        raise UserError(
            f"data.share_prompts: loss_type={whole} takes the likelihood of prompts with their chosen answers"
        )
    if config.sync_ref_model and config.adapter is not None:
        raise UserError(
            "sync_ref_model is set, but with an adapter the reference is the model as it was; leave one out"
        )
    return loss


def prepare(node: "Node") -> None:
    """Renders and packs the records with the policy's tokenizer, which has to be the reference's too."""
    loss = preference_loss(node.config)
    prepare_child(node, loss.kind)
    refuse_numbers(node, loss)
    check_reference(node)


def check_reference(node: "Node") -> None:
    """Raises UserError for a reference that cannot be this policy's."""
    if "reference" not in node.parents:
        return
    parent, policy = (origin(node.parents[field], field) for field in ("reference", "init_from"))
    parent.model.check_predicts("reference")
    if node.config.sync_ref_model and parent.model != policy.model:
        raise UserError(f"sync_ref_model=True, but reference={node.config.reference} is of another architecture")
    if load_tokenizer(parent.tokenizer).fingerprint != load_tokenizer(policy.tokenizer).fingerprint:
        raise UserError(f"reference={node.config.reference} has another tokenizer than init_from")


def refuse_numbers(node: "Node", loss: PreferenceLoss) -> None:
    """Raises UserError for records with a `label_smoothing` of their own that none of the losses reads, or with a
    `weight` where a loss has no value of a single pair."""
    data = node.config.data
    across = next((term.name for term in loss.terms if not term.named.pairwise), None)
    if loss.unpaired or (data.path is None and not data.mixture) or (loss.smoothed_by_pair and across is None):
        return
    rows = packed_rows(node, loss.kind, load_tokenizer(node.workdir.tokenizer))
    if not loss.smoothed_by_pair and pairs_have(rows, "label_smoothing"):
        names = ",".join(term.name for term in loss.terms)
        raise UserError(f"records have a `label_smoothing`, which loss_type={names} does not read (sigmoid does)")
    if across is not None and pairs_have(rows, "weight"):
        raise UserError(f"records have a `weight`, but loss_type={across} has no loss of a single pair")


def run(node: "Node") -> None:
    """Trains the policy, and answers word problems, or else a few held-out prompts, before and after."""
    train_preference(node)


def train_preference(node: "Node", rows: LiveRows | None = None) -> None:
    """The same on the node's records, or on `rows` that are made while it trains; it is evaluated on the records."""
    config: PreferenceConfig = node.config
    loss = preference_loss(config)
    s = setup(node, loss.kind)
    policy = origin(node.parents["init_from"], "init_from")
    reference = origin(node.parents["reference"], "reference") if "reference" in node.parents else policy
    live = config.reference_logps == "live"
    # With an adapter the model without it is the reference: no second copy of its weights.
    apart = live and (s.adapting is None or reference is not policy)
    columns = None
    if config.reference_logps == "stored":
        if loss.unpaired:
            columns = stored_logps(s, reference, unpaired_logps)
        else:
            columns = stored_logps(s, reference, partial(answer_logps, ld_alpha=loss.ld_alpha), ld_alpha=loss.ld_alpha)
    make = unpaired_objective if loss.unpaired else paired_objective
    extra = regularization(config.train, s.decoder.config)
    decoders = s.policy, loss, config.reference_logps
    of_reference = {"sources": s.sources, "reference_decoder": Decoder(reference.model)}
    objective = make(*decoders, extra, **of_reference)
    if config.sync_ref_model:
        moved = synchronised(config.ref_model_mixup_alpha, config.ref_model_sync_steps)
        objective = replace(objective, synced=moved)

    def frozen() -> dict[str, Any]:
        return {"ref": load_merged(reference.path, mesh=config.mesh).params} if apart else {}

    fit(
        s,
        objective,
        lambda: load_merged(policy.path, mesh=config.mesh).params,
        evaluation=make(*decoders, **of_reference),
        running=loss.running_delta,
        frozen=frozen,
        frozen_decoders={"ref": Decoder(reference.model)} if apart else None,
        columns=columns,
        live=rows,
        finish=(problem_hook(s, before=policy), sample_hook(s, policy, loss.kind)),
    )
