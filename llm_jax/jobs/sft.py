"""The job `sft`: supervised fine-tuning on the assistant's tokens of conversations, or on completions."""

from typing import TYPE_CHECKING, Any

from llm_jax.adapters.loading import load_merged
from llm_jax.base.errors import UserError
from llm_jax.data import source_manifest as data_manifest
from llm_jax.jobs.config import SFTConfig
from llm_jax.jobs.fit import fit
from llm_jax.jobs.origin import origin
from llm_jax.jobs.regularization import regularization
from llm_jax.jobs.setup import check_training, prepare_child, setup
from llm_jax.jobs.terms import sft_objective
from llm_jax.jobs.word_problems import problem_hook

if TYPE_CHECKING:
    from llm_jax.jobs.graph import Node


def source_manifest(config: SFTConfig) -> dict[str, Any]:
    """Content hashes of the demonstrations."""
    return data_manifest("sft", config.data)


def check(node: "Node") -> None:
    """Everything that fields and files can tell. Raises UserError."""
    if node.config.init_from is None:
        raise UserError("init_from is not set: sft needs a model to start from")
    check_training(node, "sft")


def prepare(node: "Node") -> None:
    """Renders and packs the demonstrations with the parent's tokenizer."""
    prepare_child(node, "sft")


def run(node: "Node") -> None:
    """Trains from the parent's weights, and answers word problems before and after."""
    s = setup(node, "sft")
    parent = origin(node.parents["init_from"], "init_from")
    fit(
        s,
        sft_objective(s.policy, regularization(s.config.train, s.decoder.config), s.sources),
        lambda: load_merged(parent.path, mesh=s.config.mesh).params,
        evaluation=sft_objective(s.policy, sources=s.sources),
        finish=(problem_hook(s, before=parent),),
    )
