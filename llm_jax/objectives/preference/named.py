"""The strings of a config's `loss_type`, TRL's spelling and ours, and what each loss needs of the job that calls it."""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Named:
    """How to call a loss: by position `chosen_logps, rejected_logps[, ref_chosen_logps, ref_rejected_logps]`, or where
    `unpaired` `logps, ref_logps, labels`; by name `beta` (where it `has_beta`) and what the fields below say.
    """

    function: str
    """Its name in `llm_jax.objectives`."""
    unpaired: bool = False
    """Its rows hold one answer with a label (True: desirable) instead of a pair."""
    reference: bool = True
    """Takes the reference's log-probabilities."""
    lengths: tuple[str, ...] = ()
    """Of `chosen_lengths`, `rejected_lengths` (tokens per answer, the one that ends it included) those it takes."""
    scores: bool = False
    """Takes `chosen_scores` and `rejected_scores`: columns of the records."""
    nll: Literal["answer", "sequence"] | None = None
    """Takes `chosen_nll`, each pair's share of the negative log-likelihood of the chosen side (`objectives.nll_shares`
    makes it a mean over the tokens of the whole batch): of the answer's tokens, or of prompt and answer."""
    statistics: str | None = None
    """The batch statistic it takes, an argument of this name, from the per-example values of the whole batch:
    `kl` by `objectives.kto_kl`, `delta` by `objectives.bco_delta`, `matched` by `objectives.aot_matched` or
    `objectives.aot_unpaired_matched`."""
    options: tuple[str, ...] = ()
    """Fields of the config that it reads, and takes under these names."""
    fixed: dict[str, Any] = field(default_factory=dict)
    """Arguments that this spelling fixes."""
    has_beta: bool = True
    """Reads `beta`."""
    pairwise: bool = True
    """Its value is a pair's own, so that a pair may be weighted (WPO); optimal transport matches across pairs."""


DIVERGENCE = ("f_divergence_type", "f_alpha_divergence_coef")
BOTH = ("chosen_lengths", "rejected_lengths")
LABEL_WEIGHTS = ("desirable_weight", "undesirable_weight")

_SIGMOID = Named("dpo", options=("label_smoothing", *DIVERGENCE))
_ROBUST = Named("robust_dpo", options=("label_smoothing", *DIVERGENCE))
_EXO = Named("exo", options=("label_smoothing", *DIVERGENCE))
_NCA = Named("nca")
_ALPHA_PO = Named("alpha_po", reference=False, lengths=BOTH, options=("simpo_gamma", "alpha", "label_smoothing"))

LOSSES: dict[str, Named] = {
    # TRL's DPOTrainer.
    "sigmoid": _SIGMOID,
    "hinge": Named("hinge", options=DIVERGENCE),
    "ipo": Named("ipo", lengths=BOTH, options=DIVERGENCE),
    "exo_pair": _EXO,
    "nca_pair": _NCA,
    "robust": _ROBUST,
    "bco_pair": Named("bco", fixed={"delta": 0.0}),
    "sppo_hard": Named("sppo_hard"),
    "aot": Named("aot", options=("label_smoothing",), statistics="matched", pairwise=False),
    "aot_unpaired": Named("aot_unpaired", options=("label_smoothing",), statistics="matched", pairwise=False),
    "apo_zero": Named("apo_zero"),
    "apo_down": Named("apo_down"),
    "discopop": Named("discopop", options=("discopop_tau", *DIVERGENCE)),
    "sft": Named("sft_pair", reference=False, nll="answer", has_beta=False),
    "sigmoid_norm": Named("sigmoid_norm", lengths=BOTH, options=DIVERGENCE),
    # TRL's KTOTrainer.
    "kto": Named("kto", unpaired=True, statistics="kl", options=LABEL_WEIGHTS),
    "apo_zero_unpaired": Named("apo_zero_unpaired", unpaired=True, options=LABEL_WEIGHTS),
    # TRL's CPOTrainer and ORPOTrainer. CPOTrainer says sigmoid, hinge and ipo, which above are measured against a
    # reference.
    "cpo": Named("cpo", reference=False, nll="answer", options=("cpo_alpha", "label_smoothing")),
    "cpo_hinge": Named("cpo_hinge", reference=False, nll="answer", options=("cpo_alpha",)),
    "cpo_ipo": Named("cpo_ipo", reference=False, lengths=BOTH, nll="answer", options=("cpo_alpha",)),
    "simpo": Named("simpo", reference=False, lengths=BOTH, options=("simpo_gamma", "label_smoothing")),
    "alphapo": _ALPHA_PO,
    "orpo": Named("orpo", reference=False, lengths=BOTH, nll="sequence"),
    # No string of TRL's 1.16.
    "bco": Named("bco", statistics="delta"),
    "bco_unpaired": Named("bco_unpaired", unpaired=True, statistics="delta", options=LABEL_WEIGHTS),
    "dpop": Named("dpop", options=("dpop_lambda",)),
    "rpo": Named("rpo", lengths=("chosen_lengths",), options=("rpo_alpha",)),
    "sppo": Named("sppo", scores=True),
    "spin": Named("spin"),
    # The names of the functions, where TRL's strings are others.
    "dpo": _SIGMOID,
    "robust_dpo": _ROBUST,
    "exo": _EXO,
    "nca": _NCA,
    "alpha_po": _ALPHA_PO,
}
