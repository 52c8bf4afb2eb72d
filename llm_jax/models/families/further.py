"""Layers for further tokens in a folder: DeepSeek-V3's, and those made like them."""

import abc
import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any, ClassVar

from llm_jax.base.trees import flatten
from llm_jax.models.config import ModelConfig
from llm_jax.models.decoder import Decoder
from llm_jax.models.families.base import Family
from llm_jax.models.families.tensors import Tensor
from llm_jax.models.parameter import declarations


class WithFurther(Family, abc.ABC):
    """Goes before the family that the rest of the model is like. `FIELDS` has `mtp`."""

    FURTHER: ClassVar[dict[str, str]] = {"embed_norm": "enorm", "hidden_norm": "hnorm", "project": "eh_proj"}
    """Modules beside the block of such a layer; theirs for ours."""

    @abc.abstractmethod
    def further_prefix(self, config: ModelConfig, depth: int, path: str) -> str:
        """What a tensor's name begins with, of the layer of that depth, from 0; `path`: of the parameter in it, or in
        its block."""

    def as_stored(self, config: ModelConfig, names: Collection[str]) -> ModelConfig:
        """transformers writes how many there are as it was, and leaves out the layers."""
        if not config.mtp:
            return config
        first = self.further_prefix(config.resolved(), 0, "project/weight")
        return config if any(name.startswith(first) for name in names) else config.without_further()

    def further_tensors(self, decoder: Decoder) -> list[Tensor]:
        """Those of all such layers."""
        config, found = decoder.config, []
        declared = flatten(declarations(decoder))
        for depth in range(config.mtp):
            for inside, table in (("block/", self.layer_table(config)), ("", self.FURTHER)):
                at = f"mtp/{depth}/{inside}"
                own = {path.removeprefix(at): d for path, d in declared.items() if path.startswith(at)}
                own = {path: d for path, d in own.items() if not path.startswith("block/")}
                for prefix, part in self._by_prefix(config, depth, own):
                    for tensor in self._named(part, table, prefix, None, config):
                        paths = tuple(at + path for path in tensor.paths)
                        found.append(dataclasses.replace(tensor, paths=paths))
        return found

    def _by_prefix(
        self, config: ModelConfig, depth: int, declared: Mapping[str, Any]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        prefixes = {path: self.further_prefix(config, depth, path) for path in declared}
        for prefix in dict.fromkeys(prefixes.values()):
            yield prefix, {path: declared[path] for path, own in prefixes.items() if own == prefix}
