"""What a family file is made of: how its config.json reads as ours and back, and which tensor holds which weight.

A family is a subclass with tables; `llama.py` is the one that most others are. Whatever the tables leave open is an
error that names it: a field of config.json that would change the numbers, a field of ours that the family lacks, a
weight without a tensor.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

from llm_jax.base.config import typed
from llm_jax.base.errors import UserError
from llm_jax.base.fields import field_types
from llm_jax.base.trees import flatten
from llm_jax.models.config import MOST_LAYERS, ModelConfig
from llm_jax.models.decoder import Decoder
from llm_jax.models.families.heads import LABELS, PAIRWISE, SOME, read_head, write_head
from llm_jax.models.families.packed import FIELD as PACKING
from llm_jax.models.families.packed import read_packing
from llm_jax.models.families.rope import read_rope, write_rope
from llm_jax.models.families.tensors import Form, Holding, Tensor
from llm_jax.models.head_config import HeadConfig
from llm_jax.models.parameter import abstract_params, declarations

# Read by other parts of transformers, or notes of where a model came from: carried along, without effect here.
# fmt: off
CARRIED = {
    "model_type", "transformers_version", "dtype", "torch_dtype", "use_cache", "bos_token_id", "eos_token_id",
    "pad_token_id", "unk_token_id", "sep_token_id", "_name_or_path", "name_or_path", "return_dict",
    "output_hidden_states", "output_attentions",
    "chunk_size_feed_forward", "max_sequence_length", "_flash_attn_2_enabled", "_attn_implementation",
    "_from_model_config", "task_specific_params", "auto_map", "cache_implementation", "use_return_dict",
    "_attn_implementation_autoset", PAIRWISE, *LABELS,
}
# fmt: on

# Fields of any family that change what a model computes, with the values under which it computes what ours does.
FIXED: dict[str, tuple[Any, ...]] = {
    "attention_dropout": (0, None),
    "is_encoder_decoder": (False, None),
    "is_decoder": (True, False, None),
    "add_cross_attention": (False, None),
}

KNOWN_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
SPELLING = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu", "relu2": "relu2"}

SIGHTS = {"full_attention": "full", "sliding_attention": "sliding", "chunked_attention": "chunked"}
LAYER_TYPES = {ours: theirs for theirs, ours in SIGHTS.items()}

START = ("init_std", "embed_init_std", "depth_scaled_init")
MAMBA_START = ("dt_init_min", "dt_init_max", "dt_init_floor", "chunk_size")
"""Fields of ours, and of `mamba`, that say how weights start or a scan is cut, which no family's files have to keep."""


class Family:
    """A published family; subclasses fill in the tables."""

    MODEL_TYPE: ClassVar[str]
    """`model_type` of config.json, and the name of the module."""
    ARCHITECTURE: ClassVar[str]
    """Its class in transformers that ends in the vocabulary."""
    STEM: ClassVar[str | None] = None
    """How the names of its other classes begin; None means as `ARCHITECTURE`."""
    FIELDS: ClassVar[dict[str, tuple[str, Any]]]
    """Ours -> (theirs, what transformers takes where the field is absent)."""
    CONSTANTS: ClassVar[dict[str, Any]] = {}
    """Ours -> what it is in every model of the family."""
    FIXED: ClassVar[dict[str, tuple[Any, ...]]] = {}
    """Theirs -> the values under which the model computes what ours does."""
    CARRIED: ClassVar[set[str]] = set()
    """Theirs, without effect on the numbers."""
    ALIASES: ClassVar[dict[str, str]] = {}
    """Older spellings of fields."""
    ACTIVATIONS: ClassVar[dict[str, str]] = KNOWN_ACTIVATIONS
    """Theirs -> ours."""
    THETA: ClassVar[float] = 10000.0
    """`rope_theta` where config.json has none."""
    PARTIAL: ClassVar[float] = 1.0
    """`partial_rotary_factor` where config.json has none."""
    TOKENS: ClassVar[dict[str, int]] = {}
    """Special tokens that transformers takes where config.json names none, and that a small vocabulary lacks."""

    TOP: ClassVar[dict[str, str]] = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
    """Modules outside of the layers."""
    SCORE: ClassVar[dict[str, str]] = {"sequence": "score", "token": "score"}
    """The last projection of models that end in scores of a text or of each token."""
    PREFIX: ClassVar[str] = "model.layers."
    LAYER: ClassVar[dict[str, str]] = {}
    """Modules of a layer, or single parameters; theirs for ours."""
    FUSED: ClassVar[dict[str, tuple[str, ...]]] = {}
    """Their modules that hold several of ours."""
    TRANSPOSED: ClassVar[bool] = True
    """Whether projections are stored [outputs, inputs], as torch's Linear does."""
    RUNNING: ClassVar[dict[str, str]] = {}
    """Parts of tensors' names -> what they are called in a running model of transformers 5, as adapters' files say."""
    EXPERTS_TURNED: ClassVar[bool] = False
    """Whether PEFT takes the outputs of the experts' parameters for inputs."""

    # Config.

    def from_hf(self, hf: Mapping[str, Any]) -> ModelConfig:
        """The decoder's config. Raises UserError naming a field that the decoder does not honour."""
        hf = self._today(hf)
        fixed = {**FIXED, **self.FIXED}
        read_packing(hf)
        read, known = self._read(), self._known()
        for name, value in hf.items():
            if name in fixed and name not in read and value not in fixed[name]:
                raise UserError(f"config.json: {name}={value!r} is not supported (only {fixed[name][0]!r})")
            if name not in known and value not in (None, False, {}, []):
                raise UserError(f"config.json: {name}={value!r} is not a field of the {self.MODEL_TYPE} family")
        values = dict(self.CONSTANTS)
        for name, (theirs, default) in self.FIELDS.items():
            values[name] = self.value_from_hf(name, theirs, hf.get(theirs, default))
        if not 1 <= values.get("num_layers", 1) <= MOST_LAYERS:
            theirs = self.FIELDS["num_layers"][0]
            raise UserError(f"config.json: {theirs}={values['num_layers']} is not between 1 and {MOST_LAYERS}")
        values |= self.derived(hf, values) | {"head": read_head(hf, self.heads(hf))}
        config = ModelConfig(family=self.MODEL_TYPE, **values)
        config.resolved()
        return config

    def _read(self) -> set[str]:
        return {theirs for theirs, _ in self.FIELDS.values()} | self.derived_fields() | {"architectures", PACKING}

    def _known(self) -> set[str]:
        return self._read() | FIXED.keys() | self.FIXED.keys() | CARRIED | self.CARRIED

    def unknown(self, hf: Mapping[str, Any]) -> list[str]:
        """Fields that the family does not have, of a config.json that `from_hf` takes: they are empty there."""
        return sorted(self._today(hf).keys() - self._known())

    def _today(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        """The fields in today's spelling. Raises UserError where two spellings of one say different things."""
        fields: dict[str, Any] = {}
        for name, value in hf.items():
            today = self.ALIASES.get(name, name)
            if today in fields and fields[today] != value:
                raise UserError(f"config.json: {name}={value!r}, but another spelling of it says {fields[today]!r}")
            fields[today] = value
        return fields

    def as_stored(self, config: ModelConfig, names: Collection[str]) -> ModelConfig:
        """The config of what a folder holds, by the names of its tensors, where its config.json says less than all."""
        del names
        return config

    def value_from_hf(self, name: str, theirs: str, value: Any) -> Any:
        """A field's value as ours; raises UserError where it has another type or is an unknown activation."""
        where = f"config.json: {theirs}"
        if name != "activation":
            return typed(field_types(ModelConfig)[name], value, where)
        if not isinstance(value, str) or value not in self.ACTIVATIONS:
            raise UserError(f"{where}={value!r} is not one of {', '.join(self.ACTIVATIONS)}")
        return self.ACTIVATIONS[value]

    def derived_fields(self) -> set[str]:
        """Names of fields that `derived` reads."""
        rope = {"rope_theta", "rope_parameters", "rope_scaling", "partial_rotary_factor"}
        return rope | {"original_max_position_embeddings"} if self.has_rope else set()

    def derived(self, hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of ours that no single field of theirs says. `values`: those that one says."""
        return read_rope(hf, values, self.THETA, self.PARTIAL) if self.has_rope else {}

    @property
    def has_rope(self) -> bool:
        return self.CONSTANTS.get("positions", "rope") == "rope"

    def to_hf(self, config: ModelConfig, extra: Mapping[str, Any]) -> dict[str, Any]:
        """The config.json that transformers reads as the same model, in the spelling of release 5 and of older ones.

        `extra`: what `carried` kept of the one that the model came with. Raises UserError for a head that none of the
        family's classes has.
        """
        fields = self._all_but_head(config.resolved(), extra)
        return fields | write_head(config, self.heads(fields), extra)

    def _all_but_head(self, config: ModelConfig, extra: Mapping[str, Any]) -> dict[str, Any]:
        assert config.vocab_size is not None
        # transformers makes no embedding whose padding is none of its rows.
        absent = {name: None for name, token in self.TOKENS.items() if token >= config.vocab_size}
        fields: dict[str, Any] = {"model_type": self.MODEL_TYPE} | absent | dict(extra)
        for name, (theirs, _) in self.FIELDS.items():
            value = getattr(config, name)
            if name == "activation" and self.ACTIVATIONS.get(fields.get(theirs, "")) != value:
                fields[theirs] = SPELLING[value]
            elif name != "activation":
                fields[theirs] = list(value) if isinstance(value, tuple) else value
        return fields | self.written(config)

    def heads(self, hf: Mapping[str, Any]) -> dict[str, HeadConfig]:
        """What the family's models end in, by their class in transformers; first the one that takes text on.

        For classification there are two: a text's scores, read at its last token, and each token's. Some families
        have no such class in transformers; their folders are written as if they had.
        """
        del hf
        stem = self.STEM or self.ARCHITECTURE.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
        return {
            self.ARCHITECTURE: HeadConfig(),
            f"{stem}ForSequenceClassification": HeadConfig(labels=SOME),
            f"{stem}ForTokenClassification": HeadConfig(labels=SOME, pooling="none", bias=True),
        }

    def written(self, config: ModelConfig) -> dict[str, Any]:
        """Fields of theirs that `derived` reads."""
        return write_rope(config, self.PARTIAL) if self.has_rope and config.positions == "rope" else {}

    def carried(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a config.json that say nothing new to the decoder, for the next `to_hf`."""
        kept = CARRIED | self.CARRIED | FIXED.keys() | self.FIXED.keys()
        if "activation" in self.FIELDS:
            kept.add(self.FIELDS["activation"][0])
        return {name: value for name, value in hf.items() if name in kept}

    def check(self, config: ModelConfig) -> None:
        """Raises UserError naming a field of the config that the family's files could not say.

        A head for scores is free: what no class of the family has is kept in native folders alone.
        """
        given, plain, config = config, ModelConfig(), config.resolved()
        scored = config.head.labels is not None
        again = _kept(self.from_hf(self._all_but_head(config, {}) if scored else self.to_hf(config, {})))
        config = _kept(config)
        names = [field.name for field in dataclasses.fields(config) if not (scored and field.name == "head")]
        differ = [name for name in names if getattr(config, name) != getattr(again, name)]
        # First what was said, not what follows from it.
        for name in sorted(differ, key=lambda name: getattr(given, name) == getattr(plain, name)):
            raise UserError(
                f"model.{name}={getattr(config, name)!r}: the {self.MODEL_TYPE} family has {getattr(again, name)!r} "
                "there; model.family=llm_jax takes any combination"
            )

    # Weights.

    def tensors(self, decoder: Decoder, present: frozenset[str] = frozenset()) -> list[Tensor]:
        """Which tensors of a folder hold the decoder's parameters, top to bottom.

        Where a family's folders come with tensors of two kinds, those that the names `present` are of.
        """
        del present
        flat, declared = flatten(abstract_params(decoder)), flatten(declarations(decoder))
        top = {path: declared[path] for path in flat if not path.startswith(("segments/", "mtp/"))}
        found = self._named(top, self.top_table(decoder.config), "", None, decoder.config)
        for s, segment in enumerate(decoder.groups):
            for position in range(len(segment.block)):
                start = f"segments/{s}/{position}/"
                inner = {path.removeprefix(start): declared[path] for path in flat if path.startswith(start)}
                for layer in segment.layers(position):
                    table = self.layer_table(decoder.config)
                    found += self._named(inner, table, f"{self.PREFIX}{layer}.", layer, decoder.config)
        return found

    def top_table(self, config: ModelConfig) -> Mapping[str, str]:
        """`TOP`, and the last projection of models that end in scores."""
        return {**self.TOP, "score": self.SCORE["token" if config.head.pooling == "none" else "sequence"]}

    def layer_table(self, config: ModelConfig) -> Mapping[str, str]:
        """`LAYER`, where it is not the same for all models."""
        del config
        return self.LAYER

    def fused_table(self, config: ModelConfig) -> Mapping[str, tuple[str, ...]]:
        """`FUSED`, where it is not the same for all models."""
        del config
        return self.FUSED

    def _named(
        self, declared: Mapping[str, Any], table: Mapping[str, str], prefix: str, layer: int | None, config: ModelConfig
    ) -> list[Tensor]:
        holding = self.fused_table(config)
        found, fused = [], {ours: theirs for theirs, parts in holding.items() for ours in parts}
        for path, declaration in declared.items():
            module, _, leaf = path.rpartition("/")
            if module in fused:
                theirs, parts = fused[module], holding[fused[module]]
                if module == parts[0]:
                    paths = tuple(f"{part}/{leaf}" for part in parts)
                    found.append(Tensor((f"{prefix}{theirs}.{leaf}",), paths, layer, self.fused_form(theirs, config)))
                continue
            if path not in table and module not in table:
                raise UserError(f"the {self.MODEL_TYPE} family has no tensor for {path}")
            name = table[path] if path in table else f"{table[module]}.{leaf}"
            turned = declaration.matrix is not None and not module.endswith("embed")
            form = Form(transposed=turned and (self.TRANSPOSED or layer is None))
            found.append(Tensor((prefix + name,), (path,), layer, form))
        return found

    def fused_form(self, theirs: str, config: ModelConfig) -> Holding:
        """How a tensor of `FUSED` holds its parts: side by side, or group by group (a head, a key head)."""
        del theirs, config
        return Form(transposed=self.TRANSPOSED)

    def canonical(self, name: str) -> str:
        """A tensor's name in today's spelling, from an older one."""
        return name

    def running(self, name: str) -> str:
        """A tensor's name as a running model of transformers 5 has it."""
        for stored, running in self.RUNNING.items():
            name = name.replace(stored, running)
        return name

    def is_derived(self, name: str, config: ModelConfig) -> bool:
        """Whether a tensor of a folder holds nothing that the config and the other tensors do not say."""
        tied = config.tie_embeddings and config.head.labels is None and name == f"{self.TOP['head']}.weight"
        return tied or name.endswith("rotary_emb.inv_freq")


def _kept(config: ModelConfig) -> ModelConfig:
    """The resolved config with defaults for what files need not keep."""
    plain = ModelConfig()
    mamba = dataclasses.replace(config.mamba, **{name: getattr(plain.mamba, name) for name in MAMBA_START})
    start = {name: getattr(plain, name) for name in START}
    return dataclasses.replace(config.resolved(), mamba=mamba, **start)


def read_sights(hf: Mapping[str, Any], default: Sequence[str]) -> tuple[str, ...]:
    """What layers see, from `layer_types`; `default` where it is absent. Raises UserError for an unknown type."""
    types = typed(tuple[str, ...] | None, hf.get("layer_types"), "config.json: layer_types")
    for name in types or ():
        if name not in SIGHTS:
            raise UserError(f"config.json: layer_types has {name!r}, not one of {', '.join(SIGHTS)}")
    return tuple(default) if types is None else tuple(SIGHTS[name] for name in types)


def write_sights(config: ModelConfig) -> dict[str, Any]:
    """`layer_types` of a resolved config."""
    assert config.sights is not None
    return {"layer_types": [LAYER_TYPES[sees] for sees in config.sights]}


def every(count: int, last: str, others: str, layers: int) -> list[str]:
    """A pattern of `count` layers: `others`, and at its end `last`."""
    return [last if (layer + 1) % count == 0 else others for layer in range(layers)]


def near(value: float) -> float:
    """The short number that a reciprocal or a root was taken of: 24.000000000000004 is 24."""
    short = round(value, 9)
    short = short if math.isclose(value, short, rel_tol=1e-12) else value
    return int(short) if float(short).is_integer() else short
