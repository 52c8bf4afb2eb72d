"""The job `pretrain`: next-token prediction on packed documents, from random weights or from a model."""

import dataclasses
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from etils import epath

from llm_jax.adapters.loading import load_merged
from llm_jax.base.config import to_dict
from llm_jax.base.errors import UserError
from llm_jax.data import Tokenizer, load_tokenizer, pretrain_texts, train_bpe, train_sentencepiece
from llm_jax.data import source_manifest as data_manifest
from llm_jax.data.bpe_text import CHOICE
from llm_jax.data.config import TokenizerConfig
from llm_jax.data.store import obtain
from llm_jax.data.tokenizer_training import check_bpe_size
from llm_jax.data.tokenizers import has_tokenizer, tokenizer_manifest
from llm_jax.jobs.config import PretrainConfig
from llm_jax.jobs.fit import fit
from llm_jax.jobs.held_out import text_hook
from llm_jax.jobs.origin import origin
from llm_jax.jobs.regularization import check_of_model, regularization
from llm_jax.jobs.setup import check_shapes, check_training, packed_sets, prepare_child, prepare_rows, setup
from llm_jax.jobs.terms import sft_objective
from llm_jax.jobs.word_problems import problem_hook
from llm_jax.models import init_params
from llm_jax.models.config import ModelConfig
from llm_jax.models.families import family
from llm_jax.sharding import make_plan
from llm_jax.storage.remote import local_copy, to_path

if TYPE_CHECKING:
    from llm_jax.jobs.graph import Node


def source_manifest(config: PretrainConfig) -> dict[str, Any]:
    """Content hashes of the texts, and of the tokenizer's files where one is given."""
    manifest = data_manifest("pretrain", config.data)
    if config.tokenizer.path is not None:
        manifest["tokenizer"] = tokenizer_manifest(tokenizer_folder(config.tokenizer))
    return manifest


def check(node: "Node") -> None:
    """Everything that fields and files can tell. Raises UserError."""
    config: PretrainConfig = node.config
    if config.init_from is not None:
        for name, default in (("model", ModelConfig()), ("tokenizer", TokenizerConfig())):
            if getattr(config, name) != default:
                raise UserError(f"{name}.* is set, but it comes from init_from={config.init_from}")
    else:
        # The size of a vocabulary that is still to be trained is the one thing not known yet.
        known = dataclasses.replace(config.model, vocab_size=config.model.vocab_size or 1)
        family(config.model.family).check(known)
        check_shapes(config, make_plan(config.mesh), config.model)
        check_of_model(config.train, config.model, fresh=True)
        check_bpe_size(config.tokenizer.vocab_size)
    path, default = config.tokenizer.path, TokenizerConfig()
    for name in ("kind", "vocab_size", "split_digits"):
        value, unset = getattr(config.tokenizer, name), getattr(default, name)
        if path is not None and value != unset:
            raise UserError(
                f"tokenizer.{name}={value} is for a new one; with tokenizer.path={path} leave it at {unset}"
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
    """The tokenizer of an earlier preparation, the one that is given, or one trained on the job's own text."""
    config: PretrainConfig = node.config
    if (node.workdir.tokenizer / "tokenizer.json").exists():
        return load_tokenizer(node.workdir.tokenizer)
    if config.tokenizer.path is not None:
        return load_tokenizer(tokenizer_folder(config.tokenizer))

    def train(folder: epath.Path) -> dict[str, Any]:
        tokenizer = _trained(pretrain_texts(config.data), config.tokenizer)
        tokenizer.save(folder)
        return {"vocab_size": tokenizer.vocab_size}

    # Kept beside the packed sets, under the hash of what it is made from.
    store = packed_sets(node, local_copy(node.workdir.data, node.hash))
    made_by = {"choice": CHOICE, **{name: version(name) for name in ("tokenizers", "sentencepiece")}}
    inputs = {**source_manifest(config), "tokenizer": to_dict(config.tokenizer), "made_by": made_by}
    return load_tokenizer(obtain(store, inputs, train))


def _trained(texts: Iterable[str], given: TokenizerConfig) -> Tokenizer:
    match given.kind:
        case "bpe":
            return train_bpe(texts, given.vocab_size, given.split_digits)
        case "sentencepiece_bpe":
            return train_sentencepiece(texts, given.vocab_size, "bpe", given.split_digits)
        case "sentencepiece_unigram":
            return train_sentencepiece(texts, given.vocab_size, "unigram", given.split_digits)


def tokenizer_folder(config: TokenizerConfig) -> str:
    """`tokenizer.path`. Raises UserError where no tokenizer is there."""
    assert config.path is not None
    if not has_tokenizer(to_path(config.path, f"tokenizer.path={config.path}")):
        raise UserError(f"tokenizer.path={config.path} has no tokenizer.json and no tokenizer.model")
    return config.path


def run(node: "Node") -> None:
    """Trains, compares the held-out text with n-gram models, and answers word problems."""
    s = setup(node, "pretrain")
    objective = sft_objective(s.decoder, regularization(s.config.train, s.decoder.config), s.sources)
    plain = sft_objective(s.decoder, sources=s.sources)

    def policy() -> Mapping[str, Any]:
        parent = node.parents.get("init_from")
        if parent is None:
            return init_params(s.decoder, s.config.train.seed, s.shardings)
        return load_merged(origin(parent, "init_from").path, mesh=s.config.mesh).params

    fit(s, objective, policy, evaluation=plain, finish=(text_hook(s, plain), problem_hook(s)))
