"""The graph of references: which runs a config needs, where they live, and in which order they are made.

A job is a module `llm_jax.jobs.JOB` with four functions, called in this order:

- `source_manifest(config) -> dict`: content hashes of what the data are made from; part of the run's hash.
- `check(node)`: everything that files and fields can tell (records, mesh, shapes); writes nothing.
- `prepare(node)`: builds tokenizer and packed data in the node's workdir, from its parents' prepared ones.
- `run(node)`: the work; its parents are done.

All checks come before all preparations, and these before the first run: bad input ends a chain before it trains.
Of several processes the first locks, prepares and marks; the others wait for it and compare what they see.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etils import epath

from llm_jax.base import processes
from llm_jax.base.config import to_dict
from llm_jax.base.errors import UserError
from llm_jax.base.fields import field_value, fields_of_type
from llm_jax.base.logging import log
from llm_jax.base.model_ref import ModelRef
from llm_jax.jobs import together
from llm_jax.jobs.changes import hashed_fields, refuse_changes
from llm_jax.jobs.external import check_external, external_hash, external_model
from llm_jax.jobs.registry import ConfigFile, job_module, load_config, split_reference
from llm_jax.storage.hashes import canonical_hash
from llm_jax.storage.workdir import FORMAT, Workdir

Override = tuple[str, str]
"""Dotted name of a field and the text of its value."""


@dataclass(frozen=True, eq=False)
class Node:
    """One run: a bound configuration, the runs or folders it refers to, and the folder it lives in."""

    name: str
    job: str
    config: Any
    parents: "dict[str, Node | epath.Path]"
    """By dotted field; a path is a model's folder that was made elsewhere."""
    parent_hashes: dict[str, str]
    source_hash: str
    hash: str
    workdir: Workdir

    def is_done(self) -> bool:
        """Whether this very run was finished (its workdir may have been, with fewer steps)."""
        return (self.workdir.done_summary() or {}).get("hash") == self.hash

    def record(self) -> dict[str, Any]:
        """What the run's `config.json` holds."""
        paths = {f: p.workdir.path if isinstance(p, Node) else p for f, p in self.parents.items()}
        return {
            "format": FORMAT,
            "name": self.name,
            "job": self.job,
            "hash": self.hash,
            "config": to_dict(self.config),
            "sources": self.source_hash,
            "parents": {f: {"path": str(path), "hash": self.parent_hashes[f]} for f, path in paths.items()},
        }


@dataclass(frozen=True, eq=False)
class _Draft:
    """A config with its references followed, before anything is hashed or a job's module imported."""

    file: ConfigFile
    config: Any
    parents: "dict[str, _Draft | epath.Path]"


def resolve(reference: str, overrides: Sequence[Override] = (), workdir: str | None = None) -> Node:
    """The run that a config names, with all the runs it refers to.

    Overrides apply to this config only. `workdir` replaces `runs/NAME-HASH`. Raises UserError for whatever is wrong
    with a config, a reference or a source, for a cycle, and for a workdir that was made with another configuration.
    """
    draft = _follow(load_config(reference), overrides, (), {})
    root = _node(draft, workdir, {})
    for node in _depth_first(root):
        refuse_changes(node.workdir, node.record())
    return root


def run(reference: str, overrides: Sequence[Override] = (), workdir: str | None = None) -> Node:
    """Makes the run that a config names, and first those of its ancestors that aren't done."""
    root = resolve(reference, overrides, workdir)
    todo = unfinished(root)
    together.agree_on_runs(_depth_first(root), todo)
    if not todo:
        log(f"{root.name}: already done, {root.workdir}")
        return root
    make(todo)
    log(f"{root.name}: done, {root.workdir}")
    return root


def make(nodes: Sequence[Node], run: Callable[[Node], None] | None = None) -> None:
    """Checks, prepares and does runs that are still to be made, parents before children.

    `run` does them; None: each one's job.
    """
    with _prepared(nodes) as locks:
        for node in nodes:
            if not processes.from_first(node.is_done):
                log(f"{node.name}: {'goes on' if node.workdir.checkpoints.exists() else 'begins'} in {node.workdir}")
                (run or job_module(node.job).run)(node)
                done = {"name": node.name, "hash": node.hash}
                processes.from_first(lambda node=node, done=done: node.workdir.mark_done(done))
            locks[node].close()


def prepare(reference: str, overrides: Sequence[Override] = (), workdir: str | None = None) -> Node:
    """The run that a config names, with its data and its ancestors' built but nothing trained."""
    root = resolve(reference, overrides, workdir)
    with _prepared(unfinished(root)):
        return root


def unfinished(root: Node) -> list[Node]:
    """The runs still to be made, parents before children; what only a finished run needed is not among them."""
    return _depth_first(root, skip_done=True)


@contextlib.contextmanager
def _prepared(nodes: Sequence[Node]) -> Iterator[Mapping[Node, contextlib.ExitStack]]:
    """Checks and prepares runs, and holds the lock of each until it is closed here or by the caller."""
    for node in nodes:
        job_module(node.job).check(node)
        for parent in node.parents.values():
            if not isinstance(parent, Node):
                check_external(parent)
    if nodes:
        log(f"preparing {', '.join(node.name for node in nodes)}")
    with contextlib.ExitStack() as stack:
        locks = {node: stack.enter_context(contextlib.ExitStack()) for node in nodes}
        # Children first: if the one that was asked for is in use, no parent's folder is touched.
        for node in reversed(nodes) if processes.first() else ():
            locks[node].enter_context(node.workdir.lock())
        if (watch := processes.watch()) is not None:
            watch.before_exit.append(stack.close)
        for node in nodes:
            processes.from_first(lambda node=node: _prepare(node))
        together.agree_on_files(nodes)
        yield locks


def _prepare(node: Node) -> None:
    # Another run may have been at work here, and have finished, until the lock was had.
    refuse_changes(node.workdir, node.record())
    if node.is_done():
        return
    if not node.workdir.config.exists() or node.workdir.read_config() != node.record():
        node.workdir.write_config(node.record())
    # A run that goes on with more steps is no longer done.
    node.workdir.done.unlink(missing_ok=True)
    job_module(node.job).prepare(node)


def _follow(
    file: ConfigFile, overrides: Sequence[Override], trail: tuple[ConfigFile, ...], made: dict[tuple[Path, str], _Draft]
) -> _Draft:
    """Binds a config and follows its references, depth first; each config file and variant becomes one draft."""
    key = file.path, file.variant
    if key in [(above.path, above.variant) for above in trail]:
        raise UserError(f"cycle of references: {' -> '.join(f.label for f in (*trail, file))}")
    if key in made:
        return made[key]
    config = file.resolve(overrides)
    parents: dict[str, _Draft | epath.Path] = {}
    for field in fields_of_type(type(config), ModelRef):
        value = field_value(config, field)
        if value is None:
            continue
        # A file's references are relative to the file, those typed in a shell to where it was typed.
        typed = field in dict(overrides)
        folders = (Path(), file.path.parent) if typed else (file.path.parent, Path())
        if split_reference(value):
            try:
                parent = load_config(value, folders=folders)
            except UserError as e:
                raise UserError(f"{field}={value}: {e}") from None
            parents[field] = _follow(parent, (), (*trail, file), made)
        else:
            parents[field] = external_model(field, value, folders)
    made[key] = _Draft(file, config, parents)
    return made[key]


def _node(draft: _Draft, workdir: str | None, made: dict[_Draft, Node]) -> Node:
    """Hashes a draft and its ancestors."""
    if draft in made:
        return made[draft]
    parents: dict[str, Node | epath.Path] = {
        field: _node(parent, None, made) if isinstance(parent, _Draft) else parent
        for field, parent in draft.parents.items()
    }
    node = make_node(draft.file.name, draft.file.job, draft.config, parents, workdir)
    # Two files may say the same under the same name: that is one run.
    same = (n for n in made.values() if (n.hash, n.workdir.path) == (node.hash, node.workdir.path))
    made[draft] = next(same, node)
    return made[draft]


def make_node(
    name: str,
    job: str,
    config: Any,
    parents: "dict[str, Node | epath.Path]",
    workdir: str | os.PathLike[str] | None = None,
) -> Node:
    """A run of a bound configuration; for a job that makes further runs of its own too. `workdir` replaces
    `runs/NAME-HASH`."""
    hashes = {f: p.hash if isinstance(p, Node) else external_hash(p) for f, p in parents.items()}
    sources = canonical_hash(job_module(job).source_manifest(config))
    fields = hashed_fields(to_dict(config), parents)
    digest = canonical_hash({"format": FORMAT, "fields": fields, "sources": sources, "parents": hashes})
    folder = Workdir(workdir or epath.Path("runs") / f"{name}-{digest}")
    return Node(name, job, config, parents, hashes, sources, digest, folder)


def _depth_first(root: Node, skip_done: bool = False) -> list[Node]:
    """Every run once, parents before children; with `skip_done`, without those that are done and their ancestors."""
    order: dict[Node, None] = {}

    def visit(node: Node) -> None:
        if node not in order and not (skip_done and node.is_done()):
            for parent in node.parents.values():
                if isinstance(parent, Node):
                    visit(parent)
            order[node] = None

    visit(root)
    return list(order)
