"""The job `pretrain`: next-token prediction on packed documents, from random weights or from a model."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llm_jax.base.errors import UserError
from llm_jax.data import Tokenizer, load_tokenizer, pretrain_texts, train_bpe
from llm_jax.data import source_manifest as data_manifest
from llm_jax.data.config import TokenizerConfig
from llm_jax.data.tokenizers import tokenizer_manifest
from llm_jax.jobs.config import PretrainConfig
from llm_jax.jobs.fit import check_shapes, check_training, fit, prepare_child, prepare_rows, setup
from llm_jax.jobs.held_out import text_hook
from llm_jax.jobs.origin import origin
from llm_jax.jobs.regularization import regularization
from llm_jax.jobs.terms import sft_objective
from llm_jax.jobs.word_problems import problem_hook
from llm_jax.models import init_params, load
from llm_jax.models.config import ModelConfig
from llm_jax.sharding import make_plan

if TYPE_CHECKING:
    from llm_jax.jobs.graph import Node


def source_manifest(config: PretrainConfig) -> dict[str, Any]:
    """Content hashes of the texts, and of the tokenizer's files where one is given."""
    manifest = data_manifest("pretrain", config.data)
    if config.tokenizer.path is not None:
        manifest["tokenizer"] = tokenizer_manifest(load_tokenizer_file(config.tokenizer).parent)
    return manifest


def check(node: "Node") -> None:
    """Everything that fields and files can tell. Raises UserError."""
    config: PretrainConfig = node.config
    if config.init_from is not None:
        for name, default in (("model", ModelConfig()), ("tokenizer", TokenizerConfig())):
            if getattr(config, name) != default:
                raise UserError(f"{name}.* is set, but it comes from init_from={config.init_from}")
    else:
        check_shapes(config, make_plan(config.mesh), config.model)
    path, default = config.tokenizer.path, TokenizerConfig()
    for name in ("vocab_size", "split_digits"):
        value, unset = getattr(config.tokenizer, name), getattr(default, name)
        if path is not None and value != unset:
            raise UserError(
                f"tokenizer.{name}={value} is for a new BPE; with tokenizer.path={path} leave it at {unset}"
            )
    if config.data.embedded != "problems":
        raise UserError(f"data.embedded={config.data.embedded} is for sft and preference; pretrain has its own mixture")
    check_training(node, "pretrain")


def prepare(node: "Node") -> None:
    """Takes or trains the tokenizer, and packs the texts."""
    config: PretrainConfig = node.config
    if config.init_from is not None:
        prepare_child(node, "pretrain")
        return
    tokenizer = make_tokenizer(node)
    model = config.model
    if model.vocab_size is None:
        model = dataclasses.replace(model, vocab_size=tokenizer.vocab_size)
    prepare_rows(node, "pretrain", tokenizer, model)


def make_tokenizer(node: "Node") -> Tokenizer:
    """The tokenizer of an earlier preparation, the one that is given, or a BPE trained on the job's own text."""
    config: PretrainConfig = node.config
    if (node.workdir.tokenizer / "tokenizer.json").exists():
        return load_tokenizer(node.workdir.tokenizer)
    if config.tokenizer.path is not None:
        load_tokenizer_file(config.tokenizer)
        return load_tokenizer(config.tokenizer.path)
    texts = pretrain_texts(config.data)
    return train_bpe(texts, config.tokenizer.vocab_size, config.tokenizer.split_digits)


def load_tokenizer_file(config: TokenizerConfig) -> Any:
    """The tokenizer.json of `tokenizer.path`. Raises UserError where there is none."""
    from etils import epath

    assert config.path is not None
    file = epath.Path(config.path) / "tokenizer.json"
    if not file.exists():
        raise UserError(f"tokenizer.path={config.path} has no tokenizer.json")
    return file


def run(node: "Node") -> None:
    """Trains, compares the held-out text with n-gram models, and answers word problems."""
    s = setup(node, "pretrain")
    objective, plain = sft_objective(s.decoder, regularization(s.config.train)), sft_objective(s.decoder)

    def policy() -> Mapping[str, Any]:
        parent = node.parents.get("init_from")
        if parent is None:
            return init_params(s.decoder, s.config.train.seed, s.shardings)
        return load(origin(parent, "init_from").path, mesh=s.config.mesh).params

    fit(s, objective, policy, evaluation=plain, finish=(text_hook(s, plain), problem_hook(s)))
