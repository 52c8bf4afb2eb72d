"""Checkpoints of a run: written by Orbax in the background, committed by an object that holds every file's hash.

A checkpoint is a folder `step_00000100/` with Orbax's files in `state/` and `commit.json`, which is written last,
whole or not at all, and says what is there: format, step, metric, the caller's meta, shapes and types of the arrays,
size and SHA-256 of every file. A folder without it is a leftover of a killed save. Orbax restores a flipped bit without
a word, so the hashes are verified before anything is read.

On an object store a single process makes a checkpoint in a local folder (of `TMPDIR`), hashes it there and copies it
file by file, and verifies what it restores in a local copy: each byte crosses the network once. Several processes,
which see no common local folder, let Orbax write to and read from the store, as they do on a shared disk. What lies in
the store is the same.
"""

import contextlib
import json
import math
import re
import tempfile
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from llm_jax.base import processes
from llm_jax.base.door import disk_failure
from llm_jax.base.errors import RunError, UserError
from llm_jax.base.logging import warn
from llm_jax.base.trees import flatten, unflatten
from llm_jax.storage import orbax_noise
from llm_jax.storage.atomic import write_atomically
from llm_jax.storage.hashes import canonical_hash, file_sha256
from llm_jax.storage.remote import copy_file, files_below, is_remote, to_path

FORMAT = 1
"""Format number of what this file writes; another one is refused."""

_FOLDER = re.compile(r"step_(\d{8,})")


class _Corrupt(Exception):
    """A committed checkpoint that is not what its commit.json says; the message names the file."""


def named_leaves(tree: Any) -> dict[str, Any]:
    """`{"params/policy/embed/weight": leaf}` for any pytree; the names under which a checkpoint stores its arrays."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        raise ValueError("two leaves of the tree have the same path")
    return named


class Checkpoints:
    """The checkpoints in one directory. One run writes (the holder of the workdir's lock); any process may read.

    Args:
        directory: holds the `step_…` folders; made at the first save.
        keep_last: newest checkpoints kept; at least the one just written always is.
        keep_best: further ones kept by the metric given to `save`.
        best_lower: whether a lower metric is better.
        together: whether all processes of a run make the same calls, each for its part of the arrays; else the calling
            one reads, or writes, for itself.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        keep_last: int = 2,
        keep_best: int = 0,
        best_lower: bool = True,
        *,
        together: bool = False,
    ) -> None:
        self.directory = to_path(directory)
        self._together = together and processes.several()
        self._saves = 0
        self._keep_last, self._keep_best, self._best_lower = keep_last, keep_best, best_lower
        self._orbax: ocp.AsyncCheckpointer | None = None
        self._thread: threading.Thread | None = None
        self._failure: tuple[int, BaseException] | None = None
        self._verified: set[int] = set()
        self._stage: tempfile.TemporaryDirectory[str] | None = None

    # ---- what is there

    def path(self, step: int) -> epath.Path:
        return self.directory / f"step_{step:08d}"

    def steps(self) -> list[int]:
        """Committed steps, ascending; their files are not verified."""
        return [step for step in self._folders() if self._commit_path(step).exists()]

    def read_meta(self, step: int) -> dict[str, Any]:
        """The meta given to `save`, with `format`, `step` and `metric`. UserError if it can't be read."""
        try:
            commit = self._read_commit(step)
        except _Corrupt as reason:
            raise UserError(f"checkpoint {self.path(step)}: {reason}") from None
        return {**commit["meta"], **{key: commit[key] for key in ("format", "step", "metric")}}

    def holds(self, step: int, prefix: str) -> bool:
        """Whether a checkpoint has arrays below `prefix` ("params/policy"). UserError if its commit can't be read."""
        try:
            return any(name.startswith(f"{prefix}/") for name in self._read_commit(step)["arrays"])
        except _Corrupt as reason:
            raise UserError(f"checkpoint {self.path(step)}: {reason}") from None

    def newest_good(self) -> int | None:
        """The newest step whose files all have their recorded hashes; None where nothing was ever committed.

        A corrupt one is named in a warning and passed over; UserError if all are, or if one has an unknown format.
        Of several processes the first verifies for all.
        """
        if not self._together:
            return self._newest_good()
        step = processes.from_first(self._newest_good)
        if step is not None:
            self._verified.add(step)
        return step

    def _newest_good(self) -> int | None:
        steps = self.steps()
        for step in reversed(steps):
            try:
                self._verify(step)
            except _Corrupt as reason:
                warn(f"checkpoint {self.path(step)} is corrupt ({reason}); trying the one before")
            else:
                return step
        if steps:
            raise UserError(f"every checkpoint in {self.directory} is corrupt")
        return None

    # ---- saving

    def save(self, step: int, tree: Any, meta: Mapping[str, Any], metric: float | None = None) -> None:
        """Starts a save and returns once the arrays are copied to the host, so the caller may donate them.

        Waits for the save before it. Raises RunError where that one failed.

        Args:
            step: names the checkpoint; one of that step that is there already is replaced.
            tree: pytree of jax arrays.
            meta: what JSON can hold.
            metric: ranks the checkpoint for keep_best; None or NaN leaves it out of the ranking.
        """
        self.wait()
        self._saves += 1
        try:
            if self._writes:
                self._delete(step)
            named = named_leaves(tree)
            commit = {
                "format": FORMAT,
                "step": step,
                "metric": None if metric is None or math.isnan(metric) else float(metric),
                # A copy: the commit is written later, when the caller may have changed what it holds.
                "meta": json.loads(json.dumps(meta)),
                "arrays": {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in named.items()},
            }
            self._checkpointer.save(self._at_hand(step) / "state", args=ocp.args.PyTreeSave(unflatten(named)))
        except Exception as error:
            self._failure = (step, error)
            self.check()
        self._thread = threading.Thread(target=self._finish, args=(step, commit), name=f"checkpoint-{step}")
        self._thread.start()

    def wait(self) -> None:
        """Returns when the last save is committed. RunError (one line, what was kept) where it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def close(self) -> None:
        """Lets a save that is under way come to its end; never raises."""
        if self._thread is not None:
            self._thread.join()

    def check(self) -> None:
        """Raises the RunError of a save that failed in the background; never waits."""
        if self._failure is None:
            return
        (step, error), self._failure = self._failure, None
        reason = disk_failure(error) or _one_line(error)
        raise RunError(f"checkpoint of step {step} in {self.directory} failed: {reason}; {self.last_good()}") from error

    def last_good(self) -> str:
        """The newest committed checkpoint as the end of an error message."""
        steps = self.steps()
        return f"last good checkpoint: {self.path(steps[-1])}" if steps else "no checkpoint was saved before"

    def clean(self, newer_than: int | None = None) -> None:
        """Removes uncommitted leftovers and, given the step a run continues from, what is newer (it was corrupt)."""
        if not self._writes:
            return
        committed = self.steps()
        for step in self._folders():
            if step not in committed:
                warn(f"removing {self.path(step)}: it has no commit.json (its save was interrupted)")
                self._delete(step)
            elif newer_than is not None and step > newer_than:
                self._delete(step)

    # ---- restoring

    def restore(
        self, abstract_tree: Any, step: int | None = None, *, partial: bool = False, cast: Any = None
    ) -> tuple[int, Any, dict[str, Any]] | None:
        """Arrays as `abstract_tree` asks for them: any mesh, the same names, shapes and types.

        Args:
            abstract_tree: pytree of ShapeDtypeStructs; one without a sharding goes to the first device.
            step: which; None takes `newest_good()`.
            partial: whether the checkpoint may hold more than is asked for.
            cast: pytree of dtypes that the arrays get while they are read, in place of those asked for and checked.

        Returns:
            `(step, tree, meta)`, or None where nothing was ever committed. UserError for a corrupt checkpoint, an
            unknown format, or arrays that differ from what is asked for.
        """
        step = self.newest_good() if step is None else step
        if step is None:
            return None
        wanted = named_leaves(abstract_tree)
        self._check_arrays(step, wanted, partial)
        dtypes = {name: leaf.dtype for name, leaf in wanted.items()} if cast is None else named_leaves(cast)
        first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        how = {
            name: ocp.ArrayRestoreArgs(
                sharding=leaf.sharding or first, global_shape=leaf.shape, dtype=jax.numpy.dtype(dtypes[name])
            )
            for name, leaf in wanted.items()
        }
        # What is cast takes another size while it is read: a part at a time, so that never all of it is there twice.
        sizes = {name: leaf.size * leaf.dtype.itemsize for name, leaf in wanted.items()}
        parts = [how] if cast is None else _parts(how, sizes)
        restored = self._read(step, parts)
        leaves = [restored[name] for name in wanted]
        return step, jax.tree.unflatten(jax.tree.structure(abstract_tree), leaves), self.read_meta(step)

    def restore_numpy(self, step: int, prefix: str = "") -> dict[str, Any]:
        """The arrays below `prefix` ("params/policy"; all by default) as a nested dict of np arrays without it."""
        names = self._verified_commit(step)["arrays"]
        start = f"{prefix}/" if prefix else ""
        chosen = [name for name in names if name.startswith(start)]
        if not chosen:
            raise UserError(f"checkpoint {self.path(step)} has nothing below {prefix!r}")
        read = self._read(step, [{name: ocp.RestoreArgs(restore_type=np.ndarray) for name in chosen}])
        return unflatten({name.removeprefix(start): read[name] for name in chosen})

    # ---- inside

    @property
    def _checkpointer(self) -> ocp.AsyncCheckpointer:
        if self._orbax is None:
            orbax_noise.silence()
            handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True, use_compression=False)
            in_place = ocp.options.AtomicityOptions(mode=ocp.options.AtomicityMode.COMMIT_FILE)
            # Named processes meet through the coordinator; with None they would start a collective on the devices.
            members = set(range(processes.count())) if self._together else {processes.index()}
            of = ocp.options.MultiprocessingOptions(
                primary_host=min(members),
                active_processes=members if processes.several() else None,
                barrier_sync_key_prefix=f"{self.directory}/{len(members)}" if processes.several() else None,
            )
            self._orbax = ocp.AsyncCheckpointer(handler, multiprocessing_options=of, atomicity_options=in_place)
        return self._orbax

    @property
    def _writes(self) -> bool:
        """Whether this process writes and removes what there is once."""
        return processes.first() or not self._together

    def _folders(self) -> list[int]:
        if not self.directory.exists():
            return []
        return sorted(int(match[1]) for child in self.directory.iterdir() if (match := _FOLDER.fullmatch(child.name)))

    def _commit_path(self, step: int) -> epath.Path:
        return self.path(step) / "commit.json"

    def _finish(self, step: int, commit: dict[str, Any]) -> None:
        """Runs in the background thread: waits for Orbax, hashes, commits, makes room."""
        committed = False
        try:
            self._checkpointer.wait_until_finished()
            files = self._hash_files(step)
            if self._writes:
                if self._is_staged:
                    for name in files:
                        copy_file(self._at_hand(step) / name, self.path(step) / name)
                commit = {**commit, "files": files}
                write_atomically(self._commit_path(step), json.dumps({**commit, "hash": canonical_hash(commit)}))
                committed = True
                self._verified.add(step)
                self._put_away(step)
                self._retain(step)
            if self._together:
                processes.from_first(lambda: True, f"{self._key(step)}/committed")
        except BaseException as error:
            self._failure = (step, error)
            if self._writes and not committed:
                # A disk that can't be written to: the next run removes what is left.
                with contextlib.suppress(OSError):
                    self._delete(step)

    def _key(self, step: int) -> str:
        return f"{self.directory}/{step}/{self._saves}"

    def _hash_files(self, step: int) -> dict[str, list[Any]]:
        """Size and SHA-256 of every file of a step; several processes share the work."""
        folder = self._at_hand(step)

        def of(names: Iterable[str]) -> dict[str, list[Any]]:
            return {name: [(folder / name).stat().length, file_sha256(folder / name)] for name in names}

        if not self._together:
            return of(name for name, _ in sorted(files_below(folder)))
        names = processes.from_first(
            lambda: sorted(name for name, _ in files_below(folder)), f"{self._key(step)}/names"
        )
        processes.tell(self._key(step), json.dumps(of(names[processes.index() :: processes.count()])))
        found = {name: entry for share in processes.told(self._key(step)) for name, entry in json.loads(share).items()}
        return {name: found[name] for name in names}

    def _retain(self, just_written: int) -> None:
        steps = self.steps()
        keep = {just_written, *steps[max(0, len(steps) - self._keep_last) :]}
        ranked = []
        for step in steps if self._keep_best else []:
            try:
                metric = self._read_commit(step)["metric"]
            except (_Corrupt, UserError):
                continue
            if metric is not None:
                ranked.append((metric if self._best_lower else -metric, -step))
        keep.update(-negative for _, negative in sorted(ranked)[: self._keep_best])
        for step in steps:
            if step not in keep:
                self._delete(step)

    def _delete(self, step: int) -> None:
        """The commit goes first: a kill in between leaves a leftover, never a checkpoint with files missing."""
        self._verified.discard(step)
        self._commit_path(step).unlink(missing_ok=True)
        if self.path(step).exists():
            self.path(step).rmtree()
        self._put_away(step)

    @property
    def _is_staged(self) -> bool:
        return is_remote(self.directory) and not processes.several()

    def _at_hand(self, step: int) -> epath.Path:
        """Where Orbax writes a step's files and reads them."""
        if not self._is_staged:
            return self.path(step)
        if self._stage is None:
            self._stage = tempfile.TemporaryDirectory(prefix="llm_jax-checkpoints-")
        return epath.Path(self._stage.name) / self.path(step).name

    def _put_away(self, step: int) -> None:
        """Removes the local copy of a step in an object store, which has to be verified when it is brought again."""
        if self._is_staged and self._at_hand(step).exists():
            self._at_hand(step).rmtree()
            self._verified.discard(step)

    def _read_commit(self, step: int) -> dict[str, Any]:
        try:
            commit = json.loads(self._commit_path(step).read_bytes())
            written = commit["format"]
        except FileNotFoundError:
            raise UserError(f"there is no checkpoint of step {step} in {self.directory}") from None
        except (ValueError, KeyError, TypeError, RecursionError):
            raise _Corrupt("commit.json can't be read") from None
        if written != FORMAT:
            raise UserError(f"checkpoint {self.path(step)} has format {written!r}; this version reads format {FORMAT}")
        claimed = commit.pop("hash", None)
        if claimed != canonical_hash(commit) or commit["step"] != step:
            raise _Corrupt("commit.json differs from its own hash")
        return commit

    def _verify(self, step: int) -> None:
        commit = self._read_commit(step)
        if step in self._verified:
            return
        try:
            for name, (size, sha256) in commit["files"].items():
                path = self.path(step) / name
                if not path.exists():
                    raise _Corrupt(f"{name} is missing")
                if path.stat().length != size:
                    raise _Corrupt(f"{name} has {path.stat().length} bytes instead of {size}")
                if self._is_staged:
                    copy_file(path, self._at_hand(step) / name)
                    path = self._at_hand(step) / name
                if file_sha256(path) != sha256:
                    raise _Corrupt(f"{name} has another SHA-256 than at commit")
        except BaseException:
            self._put_away(step)
            raise
        self._verified.add(step)

    def _verified_commit(self, step: int) -> dict[str, Any]:
        try:
            self._verify(step)
            return self._read_commit(step)
        except _Corrupt as reason:
            raise UserError(f"checkpoint {self.path(step)} is corrupt: {reason}") from None

    def _check_arrays(self, step: int, wanted: Mapping[str, Any], partial: bool) -> None:
        saved = self._verified_commit(step)["arrays"]
        for name, leaf in wanted.items():
            if name not in saved:
                raise UserError(f"checkpoint {self.path(step)} has no array {name}")
            shape, dtype = saved[name]
            if (tuple(shape), dtype) != (tuple(leaf.shape), str(leaf.dtype)):
                asked = f"{leaf.dtype}{list(leaf.shape)}"
                raise UserError(f"checkpoint {self.path(step)}: {name} is {dtype}{shape}, not {asked}")
        extra = sorted(set(saved) - set(wanted))
        if extra and not partial:
            raise UserError(f"checkpoint {self.path(step)} has an array {extra[0]} that this run has no place for")

    def _read(self, step: int, parts: Sequence[Mapping[str, ocp.RestoreArgs]]) -> dict[str, Any]:
        """The arrays of all parts, which are read one after the other."""
        try:
            folder, found = self._at_hand(step) / "state", {}
            for arguments in map(unflatten, parts):
                item = jax.tree.map(lambda _: 0, arguments)
                request = ocp.args.PyTreeRestore(item=item, restore_args=arguments, partial_restore=True)
                found |= flatten(self._checkpointer.restore(folder, args=request))
            return found
        finally:
            self._put_away(step)


def _parts[T](values: Mapping[str, T], sizes: Mapping[str, int]) -> list[dict[str, T]]:
    """`values` in their order, cut so that no part is larger than the largest value."""
    parts, room = [], 0
    for name, value in values.items():
        if sizes[name] > room:
            parts.append({})
            room = max(sizes.values())
        parts[-1][name] = value
        room -= sizes[name]
    return parts


def _one_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
