"""Losses as pure functions of arrays, named as in their papers. No model, no mesh, no batch layout in sight."""

from typing import TYPE_CHECKING

from llm_jax.base.lazy import lazy_exports

if TYPE_CHECKING:
    from llm_jax.objectives.experts import bias_update as bias_update
    from llm_jax.objectives.experts import importance as importance
    from llm_jax.objectives.experts import load as load
    from llm_jax.objectives.experts import load_balance as load_balance
    from llm_jax.objectives.experts import router_z as router_z
    from llm_jax.objectives.experts import sequence_balance as sequence_balance
    from llm_jax.objectives.preference.alpha_po import alpha_po as alpha_po
    from llm_jax.objectives.preference.aot import aot as aot
    from llm_jax.objectives.preference.aot import aot_matched as aot_matched
    from llm_jax.objectives.preference.aot_unpaired import aot_unpaired as aot_unpaired
    from llm_jax.objectives.preference.aot_unpaired import aot_unpaired_matched as aot_unpaired_matched
    from llm_jax.objectives.preference.apo_down import apo_down as apo_down
    from llm_jax.objectives.preference.apo_zero import apo_zero as apo_zero
    from llm_jax.objectives.preference.apo_zero_unpaired import apo_zero_unpaired as apo_zero_unpaired
    from llm_jax.objectives.preference.bco import bco as bco
    from llm_jax.objectives.preference.bco_unpaired import bco_delta as bco_delta
    from llm_jax.objectives.preference.bco_unpaired import bco_unpaired as bco_unpaired
    from llm_jax.objectives.preference.cpo import cpo as cpo
    from llm_jax.objectives.preference.cpo_hinge import cpo_hinge as cpo_hinge
    from llm_jax.objectives.preference.cpo_ipo import cpo_ipo as cpo_ipo
    from llm_jax.objectives.preference.discopop import discopop as discopop
    from llm_jax.objectives.preference.divergence import f_divergence as f_divergence
    from llm_jax.objectives.preference.dpo import dpo as dpo
    from llm_jax.objectives.preference.dpop import dpop as dpop
    from llm_jax.objectives.preference.exo import exo as exo
    from llm_jax.objectives.preference.hinge import hinge as hinge
    from llm_jax.objectives.preference.ipo import ipo as ipo
    from llm_jax.objectives.preference.kto import kto as kto
    from llm_jax.objectives.preference.kto import kto_kl as kto_kl
    from llm_jax.objectives.preference.ld_dpo import ld_dpo as ld_dpo
    from llm_jax.objectives.preference.nca import nca as nca
    from llm_jax.objectives.preference.nll import nll_shares as nll_shares
    from llm_jax.objectives.preference.nll import sft_pair as sft_pair
    from llm_jax.objectives.preference.orpo import orpo as orpo
    from llm_jax.objectives.preference.robust_dpo import robust_dpo as robust_dpo
    from llm_jax.objectives.preference.rpo import rpo as rpo
    from llm_jax.objectives.preference.shared import implicit_rewards as implicit_rewards
    from llm_jax.objectives.preference.shared import labelled_rewards as labelled_rewards
    from llm_jax.objectives.preference.sigmoid_norm import sigmoid_norm as sigmoid_norm
    from llm_jax.objectives.preference.simpo import simpo as simpo
    from llm_jax.objectives.preference.spin import spin as spin
    from llm_jax.objectives.preference.sppo import sppo as sppo
    from llm_jax.objectives.preference.sppo_hard import sppo_hard as sppo_hard
    from llm_jax.objectives.preference.wpo import wpo as wpo
    from llm_jax.objectives.reward.bradley_terry import bradley_terry as bradley_terry
    from llm_jax.objectives.reward.plackett_luce import plackett_luce as plackett_luce
    from llm_jax.objectives.reward.ranked_pairs import ranked_pairs as ranked_pairs
    from llm_jax.objectives.tokens import dft as dft
    from llm_jax.objectives.tokens import sft as sft

# A file bears its function's name one level deeper only: importing a module `objectives.dpo` would put it in the
# function's place.
__getattr__ = lazy_exports(
    globals(),
    {
        "bias_update": "llm_jax.objectives.experts",
        "importance": "llm_jax.objectives.experts",
        "load": "llm_jax.objectives.experts",
        "load_balance": "llm_jax.objectives.experts",
        "router_z": "llm_jax.objectives.experts",
        "sequence_balance": "llm_jax.objectives.experts",
        "alpha_po": "llm_jax.objectives.preference.alpha_po",
        "aot": "llm_jax.objectives.preference.aot",
        "aot_matched": "llm_jax.objectives.preference.aot",
        "aot_unpaired": "llm_jax.objectives.preference.aot_unpaired",
        "aot_unpaired_matched": "llm_jax.objectives.preference.aot_unpaired",
        "apo_down": "llm_jax.objectives.preference.apo_down",
        "apo_zero": "llm_jax.objectives.preference.apo_zero",
        "apo_zero_unpaired": "llm_jax.objectives.preference.apo_zero_unpaired",
        "bco": "llm_jax.objectives.preference.bco",
        "bco_delta": "llm_jax.objectives.preference.bco_unpaired",
        "bco_unpaired": "llm_jax.objectives.preference.bco_unpaired",
        "cpo": "llm_jax.objectives.preference.cpo",
        "cpo_hinge": "llm_jax.objectives.preference.cpo_hinge",
        "cpo_ipo": "llm_jax.objectives.preference.cpo_ipo",
        "discopop": "llm_jax.objectives.preference.discopop",
        "f_divergence": "llm_jax.objectives.preference.divergence",
        "dpo": "llm_jax.objectives.preference.dpo",
        "dpop": "llm_jax.objectives.preference.dpop",
        "exo": "llm_jax.objectives.preference.exo",
        "hinge": "llm_jax.objectives.preference.hinge",
        "ipo": "llm_jax.objectives.preference.ipo",
        "kto": "llm_jax.objectives.preference.kto",
        "kto_kl": "llm_jax.objectives.preference.kto",
        "ld_dpo": "llm_jax.objectives.preference.ld_dpo",
        "nca": "llm_jax.objectives.preference.nca",
        "nll_shares": "llm_jax.objectives.preference.nll",
        "sft_pair": "llm_jax.objectives.preference.nll",
        "orpo": "llm_jax.objectives.preference.orpo",
        "robust_dpo": "llm_jax.objectives.preference.robust_dpo",
        "rpo": "llm_jax.objectives.preference.rpo",
        "implicit_rewards": "llm_jax.objectives.preference.shared",
        "labelled_rewards": "llm_jax.objectives.preference.shared",
        "sigmoid_norm": "llm_jax.objectives.preference.sigmoid_norm",
        "simpo": "llm_jax.objectives.preference.simpo",
        "spin": "llm_jax.objectives.preference.spin",
        "sppo": "llm_jax.objectives.preference.sppo",
        "sppo_hard": "llm_jax.objectives.preference.sppo_hard",
        "wpo": "llm_jax.objectives.preference.wpo",
        "bradley_terry": "llm_jax.objectives.reward.bradley_terry",
        "plackett_luce": "llm_jax.objectives.reward.plackett_luce",
        "ranked_pairs": "llm_jax.objectives.reward.ranked_pairs",
        "dft": "llm_jax.objectives.tokens",
        "sft": "llm_jax.objectives.tokens",
    },
)
