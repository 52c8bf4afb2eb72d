"""`generation_config.json`: how the makers of a model want it sampled. Its fields are the defaults of a command.

A field that would change what comes out and that we do not have is refused by name: a model asked for with beams and
sampled without would silently be something else.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from etils import epath

from llm_jax.base.errors import UserError
from llm_jax.inference.config import SamplingParams
from llm_jax.storage.json_files import read_json

FILE = "generation_config.json"

TAKEN: dict[str, tuple[str, tuple[type, ...]]] = {
    "max_new_tokens": ("max_tokens", (int,)),
    "temperature": ("temperature", (int, float)),
    "top_k": ("top_k", (int,)),
    "top_p": ("top_p", (int, float)),
    "min_p": ("min_p", (int, float)),
    "repetition_penalty": ("repetition_penalty", (int, float)),
}
"""Theirs -> the field of `SamplingParams`, and its types."""

READ = {*TAKEN, "do_sample", "eos_token_id", "max_length", "stop_strings"}

# fmt: off
WITHOUT_EFFECT = {
    "_from_model_config", "transformers_version", "bos_token_id", "pad_token_id", "decoder_start_token_id",
    "output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate",
    "use_cache", "cache_implementation", "cache_config", "max_cache_len", "low_memory", "prefill_chunk_size",
    "compile_config", "disable_compile", "continuous_batching_config", "is_assistant", "num_assistant_tokens",
    "num_assistant_tokens_schedule", "assistant_confidence_threshold", "assistant_early_exit", "assistant_lookbehind",
    "target_lookbehind", "max_matching_ngram_size", "early_stopping", "length_penalty", "chat_format",
}
"""Of other parts of transformers, of how it computes the same tokens, or of beams (`num_beams` itself is not here)."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,), "num_beam_groups": (1,), "diversity_penalty": (0,), "penalty_alpha": (0,), "typical_p": (1,),
    "epsilon_cutoff": (0,), "eta_cutoff": (0,), "encoder_repetition_penalty": (1,), "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,), "min_length": (0,), "min_new_tokens": (0,), "guidance_scale": (1,),
    "num_return_sequences": (1,),
}
"""Values under which a field that we do not have changes nothing; null, false and empty lists never do."""
# fmt: on


@dataclass(frozen=True)
class GenerationDefaults:
    """What a model's folder says of sampling."""

    sampling: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `SamplingParams`."""
    end_ids: tuple[int, ...] = ()
    """Tokens that end an answer."""
    max_length: int | None = None
    """Tokens of prompt and answer together; None where `max_new_tokens` says it, or nothing does."""

    def under(self, given: Mapping[str, Any]) -> "GenerationDefaults":
        """What is left of them beside fields of `SamplingParams` that a caller gives."""
        sampling = {name: value for name, value in self.sampling.items() if name not in given}
        return replace(self, sampling=sampling, max_length=None if "max_tokens" in given else self.max_length)

    def fitted(self, params: SamplingParams, prompt_length: int, where: str) -> SamplingParams:
        """The parameters for a prompt of so many tokens. Raises UserError where `max_length` leaves no room."""
        if self.max_length is None:
            return params
        if prompt_length >= self.max_length:
            raise UserError(f"{where} has {prompt_length} tokens; max_length={self.max_length} leaves no room for more")
        return replace(params, max_tokens=self.max_length - prompt_length)

    def __str__(self) -> str:
        parts = [f"{name}={value!r}" for name, value in self.sampling.items()]
        parts += [f"max_length={self.max_length}"] if self.max_length is not None else []
        parts += [f"end tokens {', '.join(map(str, self.end_ids))}"] if self.end_ids else []
        return ", ".join(parts)


def read_generation_config(folder: epath.PathLike) -> GenerationDefaults:
    """Reads a folder's `generation_config.json`; nothing where there is none.

    `do_sample: false` is temperature 0. Where it is absent the other fields count as they stand (transformers would
    decode greedily and warn of them); a field that is absent is not given, whatever transformers assumes for it.

    Raises:
      UserError: not a JSON object, a value of another type, or a field that changes the output and is not ours.
    """
    file = epath.Path(folder) / FILE
    if not file.exists():
        return GenerationDefaults()
    given = _fields(file)
    for name, value in given.items():
        known = name in READ or name in WITHOUT_EFFECT or value in NEUTRAL.get(name, ())
        if not known and value is not False and value not in ([], {}):
            raise UserError(
                f"{file}: {name}={value!r} is not supported; take it out, or leave the file aside with "
                "--no-generation-config"
            )
    sampling = {
        ours: _typed(file, theirs, given[theirs], types) for theirs, (ours, types) in TAKEN.items() if theirs in given
    }
    if "do_sample" in given and not _typed(file, "do_sample", given["do_sample"], (bool,)):
        sampling = {name: value for name, value in sampling.items() if name not in ("top_k", "top_p", "min_p")}
        sampling["temperature"] = 0.0
    stop = given.get("stop_strings", [])
    stop = [stop] if isinstance(stop, str) else stop
    if not (isinstance(stop, list) and all(isinstance(text, str) and text for text in stop)):
        raise UserError(f"{file}: stop_strings={stop!r} is neither a text nor a list of texts")
    if stop:
        sampling["stop"] = tuple(stop)
    ends = _end_ids(file, given)
    length = None
    if "max_length" in given and "max_tokens" not in sampling:
        length = _typed(file, "max_length", given["max_length"], (int,))
    return GenerationDefaults(sampling, ends, length)


def read_end_ids(folder: epath.PathLike) -> tuple[int, ...]:
    """The end tokens alone, for jobs whose configuration says everything else. Raises UserError as above."""
    file = epath.Path(folder) / FILE
    return _end_ids(file, _fields(file)) if file.exists() else ()


def _fields(file: epath.Path) -> dict[str, Any]:
    fields = read_json(file)
    return {name: value for name, value in fields.items() if value is not None}


def _end_ids(file: epath.Path, given: Mapping[str, Any]) -> tuple[int, ...]:
    ends = given.get("eos_token_id", [])
    ends = ends if isinstance(ends, list) else [ends]
    for end in ends:
        if _typed(file, "eos_token_id", end, (int,)) < 0:
            raise UserError(f"{file}: eos_token_id={end} is no token's id")
    return tuple(ends)


def _typed(file: epath.Path, name: str, value: Any, types: tuple[type, ...]) -> Any:
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        raise UserError(f"{file}: {name}={value!r} is not of type {' or '.join(t.__name__ for t in types)}")
    return float(value) if float in types else value
