"""Our own: any combination that `ModelConfig` can say, in its own words. Nothing but this project reads it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from llm_jax.base.config import bind, to_dict
from llm_jax.base.trees import flatten
from llm_jax.models.config import ModelConfig
from llm_jax.models.decoder import Decoder
from llm_jax.models.families.base import CARRIED, Family
from llm_jax.models.families.tensors import Form, Tensor
from llm_jax.models.parameter import abstract_params


class Own(Family):
    MODEL_TYPE = "llm_jax"
    ARCHITECTURE = "Decoder"
    FIELDS = {}
    LAYER = {}

    def from_hf(self, hf: Mapping[str, Any]) -> ModelConfig:
        """The config, every field of it."""
        fields = {name: value for name, value in hf.items() if name not in CARRIED | {"architectures"}}
        config = bind(ModelConfig, {"family": self.MODEL_TYPE, **fields}, where="config.json")
        config.resolved()
        return config

    def to_hf(self, config: ModelConfig, extra: Mapping[str, Any]) -> dict[str, Any]:
        """Every field, resolved."""
        fields = to_dict(dataclasses.replace(config.resolved(), family=self.MODEL_TYPE))
        del fields["family"]
        return {"architectures": [self.ARCHITECTURE], "model_type": self.MODEL_TYPE, **extra, **fields}

    def unknown(self, hf: Mapping[str, Any]) -> list[str]:
        """None: they are refused."""
        del hf
        return []

    def check(self, config: ModelConfig) -> None:
        """Any combination can be said."""
        config.resolved()

    def tensors(self, decoder: Decoder, present: frozenset[str] = frozenset()) -> list[Tensor]:
        """Each parameter under its own path, layers by number."""
        del present
        found = []
        for path in flatten(abstract_params(decoder)):
            if not path.startswith("segments/"):
                found.append(Tensor((path.replace("/", "."),), (path,), None, Form(transposed=False)))
                continue
            _, segment, position, inner = path.split("/", 3)
            for layer in decoder.groups[int(segment)].layers(int(position)):
                name = f"layers.{layer}.{inner.replace('/', '.')}"
                found.append(Tensor((name,), (inner,), layer, Form(transposed=False)))
        return found

    def is_derived(self, name: str, config: ModelConfig) -> bool:
        """None."""
        del name, config
        return False


FAMILY = Own()
