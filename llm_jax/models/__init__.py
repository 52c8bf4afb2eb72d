"""Decoders: declared, initialised, run, loaded and saved. Read `decoder.py` first."""

from typing import TYPE_CHECKING

from llm_jax.base.lazy import lazy_exports

if TYPE_CHECKING:
    from llm_jax.models.cache import ContiguousCache as ContiguousCache
    from llm_jax.models.cache import Meta as Meta
    from llm_jax.models.cache import Packed as Packed
    from llm_jax.models.cache import init_caches as init_caches
    from llm_jax.models.config import ModelConfig as ModelConfig
    from llm_jax.models.decoder import Decoder as Decoder
    from llm_jax.models.decoder import layout as layout
    from llm_jax.models.decoder import unstack as unstack
    from llm_jax.models.families import family as family
    from llm_jax.models.families import family_for as family_for
    from llm_jax.models.head import token_scores as token_scores
    from llm_jax.models.head_config import HeadConfig as HeadConfig
    from llm_jax.models.init import init_params as init_params
    from llm_jax.models.loading import Model as Model
    from llm_jax.models.loading import load as load
    from llm_jax.models.new_head import with_head as with_head
    from llm_jax.models.parameter import abstract_params as abstract_params
    from llm_jax.models.parameter import bind as bind
    from llm_jax.models.parameter import declarations as declarations
    from llm_jax.models.saving import save as save
    from llm_jax.models.segments import regroup as regroup

__getattr__ = lazy_exports(
    globals(),
    {
        "ModelConfig": "llm_jax.models.config",
        "Decoder": "llm_jax.models.decoder",
        "layout": "llm_jax.models.decoder",
        "unstack": "llm_jax.models.decoder",
        "abstract_params": "llm_jax.models.parameter",
        "bind": "llm_jax.models.parameter",
        "declarations": "llm_jax.models.parameter",
        "regroup": "llm_jax.models.segments",
        "ContiguousCache": "llm_jax.models.cache",
        "Meta": "llm_jax.models.cache",
        "Packed": "llm_jax.models.cache",
        "init_caches": "llm_jax.models.cache",
        "init_params": "llm_jax.models.init",
        "token_scores": "llm_jax.models.head",
        "HeadConfig": "llm_jax.models.head_config",
        "with_head": "llm_jax.models.new_head",
        "Model": "llm_jax.models.loading",
        "load": "llm_jax.models.loading",
        "save": "llm_jax.models.saving",
        "family": "llm_jax.models.families",
        "family_for": "llm_jax.models.families",
    },
)
