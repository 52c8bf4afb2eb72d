"""A causal model made into a prefix language model, to be trained on."""

import dataclasses

from llm_jax.models.decoder import Decoder
from llm_jax.models.families import family
from llm_jax.models.loading import Model
from llm_jax.models.new_head import carried_extra, stored_dtypes


def with_prefix_lm(model: Model) -> Model:
    """The model with the same weights, whose prompts see themselves from both sides (`ModelConfig.prefix_lm`).

    "Non-causal decoder adaptation": Wang et al. 2022 (arXiv:2204.05832), section 5, where training it on with the new
    sight soon pays. No published family has such models: this one is of the family `llm_jax`.

    Raises:
        UserError: it has state-space layers, layers for further tokens, or gives no logits of next tokens.
    """
    config = dataclasses.replace(model.config.resolved(), family="llm_jax", prefix_lm=True)
    family(config.family).check(config)
    decoder = Decoder(config)
    extra, dtypes = carried_extra(model, config.family), stored_dtypes(model, decoder)
    return Model(decoder, model.params, config, model.tokenizer_dir, plan=model.plan, extra=extra, dtypes=dtypes)
