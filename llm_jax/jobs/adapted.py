"""A model with those of its adapters that prompts ask for."""

from collections.abc import Mapping, Sequence

from llm_jax.adapters.loading import AdaptedModel, load, load_merged
from llm_jax.models.loading import Model


def open_adapted(path: str, adapters: Mapping[str, str], names: Sequence[str | None], dtype: str) -> Model:
    """The model at `path` for prompts whose adapters are `names`, None for the model alone.

    One adapter for all of them is added to the weights: it costs nothing then, and may be of any kind. Several are an
    `AdaptedModel`, for `Generator`'s `adapters`. Raises UserError as `adapters.load`.
    """
    used = {name: adapters[name] for name in adapters if name in names}
    if not used:
        return load_merged(path, dtype)
    model = load(path, dtype, adapters=used)
    assert isinstance(model, AdaptedModel)
    return model if len(set(names)) > 1 else model.merged()
