"""What is committed in a directory of checkpoints: found, hashed, verified and removed.

A checkpoint is a folder `step_00000100/` with Orbax's files in `state/` and `commit.json`, which is written last,
whole or not at all, and says what is there: format, step, metric, the caller's meta, shapes and types of the arrays,
size and SHA-256 of every file. A folder without it is a leftover of a killed save. Orbax restores a flipped bit without
a word, so the hashes are verified before anything is read.
"""

import json
import re
import tempfile
from collections.abc import Iterable
from typing import Any

from etils import epath

from llm_jax.base import processes
from llm_jax.base.errors import UserError
from llm_jax.base.logging import warn
from llm_jax.storage.atomic import write_atomically
from llm_jax.storage.hashes import canonical_hash, file_sha256
from llm_jax.storage.remote import copy_file, files_below, is_remote, to_path

FORMAT = 1
"""Format number of what is written; another one is refused."""

_FOLDER = re.compile(r"step_(\d{8,})")


class Corrupt(Exception):
    """A committed checkpoint that is not what its commit.json says; the message names the file."""


class Commits:
    """The committed steps of one directory.

    Args:
        directory: holds the `step_…` folders; need not be there yet.
        together: whether all processes of a run make the same calls.
    """

    def __init__(self, directory: epath.PathLike, together: bool) -> None:
        self.directory = to_path(directory)
        self._together = together and processes.several()
        self._saves = 0
        self._verified: set[int] = set()
        self._stage: tempfile.TemporaryDirectory[str] | None = None

    def path(self, step: int) -> epath.Path:
        return self.directory / f"step_{step:08d}"

    def steps(self) -> list[int]:
        """Committed steps, ascending; their files are not verified."""
        return [step for step in self._folders() if self._commit_path(step).exists()]

    def read_meta(self, step: int) -> dict[str, Any]:
        """The meta given to `save`, with `format`, `step` and `metric`. UserError if it can't be read."""
        try:
            commit = self._read_commit(step)
        except Corrupt as reason:
            raise UserError(f"checkpoint {self.path(step)}: {reason}") from None
        return {**commit["meta"], **{key: commit[key] for key in ("format", "step", "metric")}}

    def holds(self, step: int, prefix: str) -> bool:
        """Whether a checkpoint has arrays below `prefix` ("params/policy"). UserError if its commit can't be read."""
        try:
            return any(name.startswith(f"{prefix}/") for name in self._read_commit(step)["arrays"])
        except Corrupt as reason:
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
            except Corrupt as reason:
                warn(f"checkpoint {self.path(step)} is corrupt ({reason}); trying the one before")
            else:
                return step
        if steps:
            raise UserError(f"every checkpoint in {self.directory} is corrupt")
        return None

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

    # ---- for `Checkpoints`

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

    def _commit(self, step: int, commit: dict[str, Any]) -> None:
        """Says that a step is whole, once its files lie where they are to stay."""
        if self._is_staged:
            for name in commit["files"]:
                copy_file(self._at_hand(step) / name, self.path(step) / name)
        write_atomically(self._commit_path(step), json.dumps({**commit, "hash": canonical_hash(commit)}))

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
            raise Corrupt("commit.json can't be read") from None
        if written != FORMAT:
            raise UserError(f"checkpoint {self.path(step)} has format {written!r}; this version reads format {FORMAT}")
        claimed = commit.pop("hash", None)
        if claimed != canonical_hash(commit) or commit["step"] != step:
            raise Corrupt("commit.json differs from its own hash")
        return commit

    def _verify(self, step: int) -> None:
        commit = self._read_commit(step)
        if step in self._verified:
            return
        try:
            for name, (size, sha256) in commit["files"].items():
                path = self.path(step) / name
                if not path.exists():
                    raise Corrupt(f"{name} is missing")
                if path.stat().length != size:
                    raise Corrupt(f"{name} has {path.stat().length} bytes instead of {size}")
                if self._is_staged:
                    copy_file(path, self._at_hand(step) / name)
                    path = self._at_hand(step) / name
                if file_sha256(path) != sha256:
                    raise Corrupt(f"{name} has another SHA-256 than at commit")
        except BaseException:
            self._put_away(step)
            raise
        self._verified.add(step)

    def _verified_commit(self, step: int) -> dict[str, Any]:
        try:
            self._verify(step)
            return self._read_commit(step)
        except Corrupt as reason:
            raise UserError(f"checkpoint {self.path(step)} is corrupt: {reason}") from None
