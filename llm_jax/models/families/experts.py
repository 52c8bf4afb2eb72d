"""What families with a mixture of experts share: their fields, and tensors of one expert each or of all at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from llm_jax.base.config import typed
from llm_jax.base.fields import field_types
from llm_jax.models.config import ModelConfig
from llm_jax.models.decoder import Decoder
from llm_jax.models.experts_config import ExpertsConfig
from llm_jax.models.families.base import Family
from llm_jax.models.families.tensors import Shape, Tensor


@dataclass(frozen=True)
class EachExpert:
    """As many tensors [outputs, inputs] as there are experts, for a parameter [E, inputs, outputs]."""

    def shapes(self, ours: Sequence[Shape]) -> list[Shape]:
        """Shapes of theirs."""
        experts, inputs, outputs = ours[0]
        return [(outputs, inputs)] * experts

    def read(self, theirs: Sequence[np.ndarray], ours: Sequence[Shape]) -> list[np.ndarray]:
        """Arrays of the shapes `ours`."""
        del ours
        return [np.swapaxes(np.stack(theirs), 1, 2)]

    def write(self, ours: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The other way."""
        return [array.T for array in ours[0]]


@dataclass(frozen=True)
class AllExperts:
    """One tensor [E, outputs, inputs] for one or more parameters [E, inputs, outputs], side by side along outputs."""

    def shapes(self, ours: Sequence[Shape]) -> list[Shape]:
        """Shapes of theirs."""
        experts, inputs, _ = ours[0]
        return [(experts, sum(shape[2] for shape in ours), inputs)]

    def read(self, theirs: Sequence[np.ndarray], ours: Sequence[Shape]) -> list[np.ndarray]:
        """Arrays of the shapes `ours`."""
        parts = np.split(theirs[0], np.cumsum([shape[2] for shape in ours])[:-1], axis=1)
        return [np.swapaxes(part, 1, 2) for part in parts]

    def write(self, ours: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The other way."""
        return [np.swapaxes(np.concatenate(ours, axis=2), 1, 2)]


class WithExperts(Family):
    """Goes before the family that the rest of the model is like: `class Mixtral(WithExperts, Mistral)`."""

    EXPERTS: ClassVar[dict[str, tuple[str, Any]]]
    """Fields of `ExpertsConfig`: ours -> (theirs, what transformers takes where the field is absent)."""
    EXPERTS_CONSTANTS: ClassVar[dict[str, Any]] = {}
    """The same -> what it is in every model of the family."""
    EACH: ClassVar[dict[str, str]]
    """Modules of a layer -> theirs, of expert `{}`."""
    ALL: ClassVar[dict[str, tuple[str, ...]]]
    """Tensors of all experts at once, as a running model of transformers 5 has them -> modules of ours."""
    CARRIED = {"output_router_logits", "router_aux_loss_coef", "router_jitter_noise"}

    def derived_fields(self) -> set[str]:
        return super().derived_fields() | {theirs for theirs, _ in self.EXPERTS.values()}

    def derived(self, hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        types = field_types(ExpertsConfig)
        own = {
            name: typed(types[name], hf.get(theirs, default), f"config.json: {theirs}")
            for name, (theirs, default) in self.EXPERTS.items()
        }
        return super().derived(hf, values) | {"experts": ExpertsConfig(**self.EXPERTS_CONSTANTS, **own)}

    def written(self, config: ModelConfig) -> dict[str, Any]:
        own = {theirs: getattr(config.experts, name) for name, (theirs, _) in self.EXPERTS.items()}
        return super().written(config) | own

    def tensors(self, decoder: Decoder, present: frozenset[str] = frozenset()) -> list[Tensor]:
        """One tensor per expert, as files have them; of all experts at once where `present` has such ones."""
        at_once = any(name.endswith(tuple(self.ALL)) for name in present)
        found = []
        for tensor in super().tensors(decoder):
            found += self._at_once(tensor) if at_once and isinstance(tensor.form, EachExpert) else [tensor]
        return found

    def _at_once(self, tensor: Tensor) -> list[Tensor]:
        """That of a parameter which comes first in a tensor of all experts; nothing for the others."""
        module, _, leaf = tensor.paths[0].rpartition("/")
        name, parts = next((name, parts) for name, parts in self.ALL.items() if module in parts)
        if module != parts[0]:
            return []
        paths = tuple(f"{part}/{leaf}" for part in parts)
        return [Tensor((f"{self.PREFIX}{tensor.layer}.{name}",), paths, tensor.layer, AllExperts())]

    def _named(
        self, declared: Mapping[str, Any], table: Mapping[str, str], prefix: str, layer: int | None, config: ModelConfig
    ) -> list[Tensor]:
        # In the order of the declarations: a set's is another one in each process.
        of_experts = [path for path, declaration in declared.items() if "experts" in declaration.axes]
        each = [path for path in of_experts if path.rpartition("/")[0] in self.EACH]
        rest = {path: declaration for path, declaration in declared.items() if path not in each}
        found = super()._named(rest, table, prefix, layer, config)
        for path in each:
            module, _, leaf = path.rpartition("/")
            names = tuple(f"{prefix}{self.EACH[module].format(e)}.{leaf}" for e in range(config.experts.num))
            found.append(Tensor(names, (path,), layer, EachExpert()))
        return found
