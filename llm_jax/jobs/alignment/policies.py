"""The policy of whatever round: its weights in one generator, whose programs serve all rounds."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llm_jax.adapters.loading import load_merged
from llm_jax.data.tokenizers import Tokenizer
from llm_jax.inference.generation_config import read_end_ids
from llm_jax.inference.generator import Generator
from llm_jax.jobs.config import RoundsConfig
from llm_jax.jobs.origin import origin, write_architecture
from llm_jax.models.saving import save, write_checkpoint
from llm_jax.storage.checkpoints import Checkpoints
from llm_jax.storage.remote import copy_file, files_below

if TYPE_CHECKING:
    from etils import epath

    from llm_jax.jobs.graph import Node

    Parent = Node | epath.Path

COMMIT = "commit.json"


class Policies:
    """Opens a model where it is asked for, and no sooner: a run with nothing left to sample loads none."""

    def __init__(self, node: "Node", tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self._node = node
        self._generator: Generator | None = None
        self._holds: Parent | None = None

    def of(self, policy: "Parent") -> Generator:
        """A sampler with the weights of a run or a folder; what was returned before has them too."""
        config: RoundsConfig = self._node.config
        source = origin(policy, "init_from")
        if self._generator is None:
            model = load_merged(source.path, mesh=config.mesh)
            self._generator = Generator(
                model,
                self.tokenizer,
                max_batch=config.batch_size,
                stop_ids=read_end_ids(source.tokenizer),
                plan=model.plan,
            )
        elif policy is not self._holds:
            self._generator.update_params(load_merged(source.path, mesh=config.mesh).params)
        self._holds = policy
        return self._generator

    def with_params(self, params: Mapping[str, Any]) -> Generator:
        """A sampler with the weights of a training that is under way."""
        generator = self._generator or self.of(self._node.parents["init_from"])
        generator.update_params(params)
        self._holds = None
        return generator


def publish_model(node: "Node", last: "Node") -> None:
    """Makes the last round's newest checkpoint the run's own, so that it can be another run's parent, and exports it.

    The mark that commits a checkpoint is copied last. Of a run that trains an adapter in each round it is the model
    with all of them in its weights: the last one alone is on a model that only this workdir has.
    """
    checkpoints, own = Checkpoints(last.workdir.checkpoints), Checkpoints(node.workdir.checkpoints)
    step = checkpoints.newest_good()
    assert step is not None, "a run that is done has a checkpoint"
    source, target = checkpoints.path(step), own.path(step)
    adapted = node.config.preference.adapter is not None
    if adapted:
        model = load_merged(last.workdir.path)
        write_architecture(node.workdir, model.config, model.extra)
        write_checkpoint(model, node.workdir, step)
    elif not (target / COMMIT).exists():
        for name, file in sorted(files_below(source), key=lambda entry: (entry[0] == COMMIT, entry[0])):
            copy_file(file, target / name)
    if node.config.preference.train.checkpoint.export:
        model = load_merged(node.workdir.path)
        save(model, node.workdir.export)
