"""Checkpoints of a run: written by Orbax in the background, committed by an object that holds every file's hash (see
`storage/commits.py`).

On an object store a single process makes a checkpoint in a local folder (of `TMPDIR`), hashes it there and copies it
file by file, and verifies what it restores in a local copy: each byte crosses the network once. Several processes,
which see no common local folder, let Orbax write to and read from the store, as they do on a shared disk. What lies in
the store is the same.
"""

import contextlib
import json
import math
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from llm_jax.base import processes
from llm_jax.base.door import disk_failure
from llm_jax.base.errors import RunError, UserError
from llm_jax.base.trees import flatten, unflatten
from llm_jax.storage import orbax_noise
from llm_jax.storage.commits import FORMAT, Commits, Corrupt


def named_leaves(tree: Any) -> dict[str, Any]:
    """`{"params/policy/embed/weight": leaf}` for any pytree; the names under which a checkpoint stores its arrays."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        raise ValueError("two leaves of the tree have the same path")
    return named


class Checkpoints(Commits):
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
        super().__init__(directory, together)
        self._keep_last, self._keep_best, self._best_lower = keep_last, keep_best, best_lower
        self._orbax: ocp.AsyncCheckpointer | None = None
        self._thread: threading.Thread | None = None
        self._failure: tuple[int, BaseException] | None = None

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

    def _finish(self, step: int, commit: dict[str, Any]) -> None:
        """Runs in the background thread: waits for Orbax, hashes, commits, makes room."""
        committed = False
        try:
            self._checkpointer.wait_until_finished()
            files = self._hash_files(step)
            if self._writes:
                self._commit(step, {**commit, "files": files})
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

    def _retain(self, just_written: int) -> None:
        steps = self.steps()
        keep = {just_written, *steps[max(0, len(steps) - self._keep_last) :]}
        ranked = []
        for step in steps if self._keep_best else []:
            try:
                metric = self._read_commit(step)["metric"]
            except (Corrupt, UserError):
                continue
            if metric is not None:
                ranked.append((metric if self._best_lower else -metric, -step))
        keep.update(-negative for _, negative in sorted(ranked)[: self._keep_best])
        for step in steps:
            if step not in keep:
                self._delete(step)

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
