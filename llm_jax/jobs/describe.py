"""What `python -m llm_jax.describe` says of a model or a config: shapes alone, no weights, no device."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from llm_jax.adapters.config import LoraConfig
from llm_jax.adapters.sites import Adaptation
from llm_jax.base.errors import UserError
from llm_jax.base.trees import flatten, tree_bytes
from llm_jax.data.config import DataConfig
from llm_jax.jobs.adapting import Adapting
from llm_jax.jobs.registry import load_config, split_reference
from llm_jax.jobs.regularization import check_of_model, without_noise
from llm_jax.jobs.reward import headed
from llm_jax.jobs.setup import adapter_of, policy_optimizer
from llm_jax.jobs.terms import sft_objective
from llm_jax.kernels.choice import unannounced
from llm_jax.models import Decoder, abstract_params, bind, declarations, pattern
from llm_jax.models.cache_bytes import cache_bytes, total_bytes
from llm_jax.models.config import ModelConfig
from llm_jax.models.families import family
from llm_jax.models.flops import flops_per_token, training_flops_per_token
from llm_jax.models.loading import check_folder, read_model_config
from llm_jax.models.summary import active_parameters, parameters_by_part, rows
from llm_jax.sharding import abstract_plan, check_divides
from llm_jax.sharding.config import MeshConfig
from llm_jax.storage.safetensors import has_weights
from llm_jax.training.config import TrainConfig
from llm_jax.training.memory import step_memory
from llm_jax.training.state import abstract_state
from llm_jax.training.terms import Objective, Pairs, Params, Rows


@dataclass(frozen=True)
class Setting:
    """A model, and how it would be trained and run."""

    label: str
    model: ModelConfig
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    window: int = DataConfig().window
    frozen: Mapping[str, ModelConfig] = field(default_factory=dict)
    """Further models that the step holds, by role."""
    adapter: LoraConfig | None = None
    """What is trained in place of the model."""


def read_setting(reference: str, overrides: Sequence[tuple[str, str]]) -> Setting:
    """Of a Hugging Face folder, a native folder, a workdir (small files alone), or a config `FILE.py[:variant]`.

    Fields that a config leaves to the command line may be left out here. Raises UserError for anything unreadable, and
    for overrides of what is no config.
    """
    if split_reference(reference) is None:
        if overrides:
            raise UserError(f"--config.{overrides[0][0]} is for a config file; {reference} is none")
        model = _of_folder(reference)
        return Setting(reference, model, window=min(model.max_position_embeddings, 2048))
    config, model = _of_config(reference, overrides, (Path(),), ())
    if hasattr(config, "model"):
        family(model.family).check(model)
    if not hasattr(config, "train"):
        return Setting(reference, model, mesh=config.mesh, window=min(model.max_position_embeddings, 2048))
    check_of_model(config.train, model, fresh=config.init_from is None)
    frozen, adapter = {}, adapter_of(config)
    # With an adapter the model itself, which is frozen, is the reference that is not named.
    if getattr(config, "reference_logps", "stored") == "live" and not (adapter and config.reference is None):
        frozen["ref"] = model if config.reference is None else _model(config.reference, (Path(),), ())
    return Setting(reference, model, config.train, config.mesh, config.data.window, frozen, adapter)


def _of_config(
    reference: str, overrides: Sequence[tuple[str, str]], folders: tuple[Path, ...], trail: tuple[str, ...]
) -> tuple[Any, ModelConfig]:
    if reference in trail:
        raise UserError(f"cycle of references: {' -> '.join((*trail, reference))}")
    file = load_config(reference, folders=folders)
    config = file.resolve(overrides, complete=False)
    if "init_from" in file.missing(overrides):
        raise UserError(f"{file.label} needs --config.init_from=...")
    if config.init_from is not None:
        typed = "init_from" in dict(overrides)
        beside = (Path(), file.path.parent) if typed else (file.path.parent, Path())
        model = _model(config.init_from, beside, (*trail, reference))
        return config, headed(config, model) if config.job == "reward" else model
    if not hasattr(config, "model"):
        raise UserError(f"{file.label} needs --config.init_from=...")
    model = config.model
    if model.vocab_size is None:
        model = dataclasses.replace(model, vocab_size=_vocabulary(config.tokenizer))
    return config, model


def _model(reference: str, folders: tuple[Path, ...], trail: tuple[str, ...]) -> ModelConfig:
    if split_reference(reference) is not None:
        return _of_config(reference, (), folders, trail)[1]
    return _of_folder(next((f / reference for f in folders if (f / reference).is_dir()), reference))


def _of_folder(path: str | Path) -> ModelConfig:
    """The architecture. A config.json is enough; but weights that lie beside it have to be its own."""
    model = read_model_config(path)
    if has_weights(path):
        check_folder(path)
    return model


def _vocabulary(tokenizer: Any) -> int:
    """Of the tokenizer that is given, or as large as the one to be trained may become."""
    if tokenizer.path is None:
        return tokenizer.vocab_size
    from llm_jax.data import load_tokenizer

    return load_tokenizer(tokenizer.path).vocab_size


def describe(setting: Setting, *, batch: int | None = None, platform: str = "tpu") -> dict[str, Any]:
    """All numbers, as plain values: bytes, counts, floating-point operations.

    `batch`: sequences of `window` tokens in the cache; None means the rows of a batch. Raises UserError where the mesh
    does not divide the model or the batch.
    """
    model, train = setting.model.resolved(), setting.train
    decoder = Decoder(model, remat=train.remat)
    parts = parameters_by_part(decoder)
    dtype, sequences = train.compute_dtype, train.batch_size if batch is None else batch
    kept = cache_bytes(model, dtype)
    tied = model.tie_embeddings and model.head.labels is None
    forward = flops_per_token(model, setting.window)
    return {
        "model": setting.label,
        "family": model.family,
        "layers": [dataclasses.asdict(row) for row in rows(decoder)],
        "pattern": {"mixers": pattern.mixers(model), "feed_forwards": pattern.feed_forwards(model)},
        "parameters": {
            **parts,
            "total": sum(parts.values()),
            "active": active_parameters(decoder),
            "tied_head": tied,
            "trained": None if setting.adapter is None else Adaptation(decoder, setting.adapter).num_parameters,
        },
        "flops_per_token": {
            "window": setting.window,
            "forward": forward,
            "training": training_flops_per_token(model, setting.window, setting.train.mtp_weight > 0),
            "decoding_first": flops_per_token(model, 1) if model.causal else None,
            "decoding_last": _last_token(model, setting.window) if model.causal else None,
        },
        "cache": {
            "dtype": dtype,
            "bytes_per_token": kept.per_token,
            "sliding_window": kept.window,
            "bytes_per_token_beyond": kept.per_token_beyond,
            "state_bytes": kept.state,
            "sequences": sequences,
            "window": setting.window,
            "bytes": total_bytes(model, sequences, setting.window, dtype),
        },
        "memory": _memory(setting, decoder, platform),
    }


def _last_token(model: ModelConfig, length: int) -> float:
    """Flops of the token at the end of `length`: what a sequence costs more than one that is shorter by one."""
    shorter = (length - 1) * flops_per_token(model, length - 1) if length > 1 else 0.0
    return length * flops_per_token(model, length) - shorter


def _memory(setting: Setting, decoder: Decoder, platform: str) -> dict[str, Any]:
    train, model = setting.train, decoder.config
    plan = abstract_plan(setting.mesh, compute_dtype=train.compute_dtype)
    check_divides(plan, model.cut_sizes())
    for name in ("batch_size", "microbatches"):
        if getattr(train, name) < 1:
            raise UserError(f"{name} is {getattr(train, name)}; it must be at least 1")
    pieces = train.microbatches * plan.axis_size("data")
    if train.batch_size % pieces:
        raise UserError(
            f"batch {train.batch_size} is not divided by microbatches {train.microbatches} x data "
            f"{plan.axis_size('data')}"
        )
    declared: dict[str, Any] = {"policy": declarations(decoder)}
    frozen = {}
    for role, config in setting.frozen.items():
        other = Decoder(config)
        declared[role], frozen[role] = declarations(other), abstract_params(other)
    optimizer, params = policy_optimizer(train, decoder, setting.adapter), abstract_params(decoder)
    if setting.adapter is not None:
        adapting = Adapting.of(decoder, setting.adapter)
        declared |= adapting.declarations
        frozen, params = {**adapting.abstract_frozen(plan), **frozen}, adapting.adaptation.abstract
    averaged = train.ema_decay is not None
    state = abstract_state({"policy": params}, optimizer, declared, plan, frozen=frozen, ema=averaged)
    # Which kernels this machine would take is no news of the device described.
    with unannounced():
        held = step_memory(
            state,
            declared,
            decoder,
            partial(_tokens_objective, train) if model.head.labels is None else _scores_objective,
            plan,
            batch_size=train.batch_size,
            window=setting.window,
            microbatches=train.microbatches,
            trained=[path for path, rule in optimizer.rules.items() if rule.multiplier],
            platform=platform,
        )
    return {
        "data": plan.axis_size("data"),
        "tensor": plan.axis_size("tensor"),
        "zero": plan.zero,
        "compute_dtype": train.compute_dtype,
        "batch_size": train.batch_size,
        "microbatches": train.microbatches,
        "window": setting.window,
        "remat": train.remat,
        "platform": platform,
        "per_device": {**dataclasses.asdict(held), "persistent": held.persistent, "total": held.total},
        "all_parameters_float32": tree_bytes(flatten(abstract_params(decoder))),
    }


def _tokens_objective(train: TrainConfig, decoder: Decoder) -> Objective:
    return sft_objective(decoder, without_noise(train, decoder.config))


def _scores_objective(decoder: Decoder) -> Objective:
    """The sum of all scores: its backward pass keeps what that of any loss of them does."""

    def terms(params: Params, frozen: Params, rows: Rows, statistics: Any, key: Any) -> tuple[dict[str, Any], Pairs]:
        del frozen, statistics, key
        bound = bind(decoder, params["policy"])
        hidden, _, _ = bound(rows["tokens"], rows["positions"], rows["segment_ids"])
        return {"scores": bound.scores(hidden, rows["segment_ids"]).sum()}, {}

    return Objective(terms, lambda batch: {})
