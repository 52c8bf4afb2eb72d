"""What a reader is, and what those of files have in common."""

import abc
import functools
import importlib
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

from etils import epath

from llm_jax.base.errors import UserError
from llm_jax.storage.hashes import file_sha256


class Record(NamedTuple):
    """One record and where it stands (`file:line`, or `file, row N`)."""

    where: str
    value: Any  # a JSON value, or an examples.Text piece of a text file


class Reader(abc.ABC):
    """One source of records, always in the same order. Never holds more than a batch of them.

    Every method raises UserError, naming the source and the record, for what cannot be read.
    """

    @abc.abstractmethod
    def records(self, start: int = 0) -> Iterator[Record]:
        """The records from number `start` on (from 0); nothing where there are not so many."""

    @abc.abstractmethod
    def count(self) -> int:
        """How many records there are, more cheaply than by reading each."""

    @abc.abstractmethod
    def hashes(self) -> list[list[str]]:
        """Names and hashes that change whenever the records may have changed; nothing by place or time."""

    def files(self) -> list[epath.Path]:
        """The files that are read, where there are any."""
        return []


class FileReader(Reader):
    """One file of one format, known by its ending."""

    suffixes: ClassVar[tuple[str, ...]]
    gzipped: ClassVar[bool] = False
    """Whether the same ending and `.gz` is read too."""

    def __init__(self, file: epath.Path):
        self.file = file

    @classmethod
    def reads(cls, name: str) -> bool:
        return (name.removesuffix(".gz") if cls.gzipped else name).endswith(cls.suffixes)

    def hashes(self) -> list[list[str]]:
        status = self.file.stat()
        return [[self.file.name, _sha256(str(self.file), status.length, status.mtime)]]

    def files(self) -> list[epath.Path]:
        return [self.file]


@functools.lru_cache(maxsize=4096)
def _sha256(file: str, length: int, mtime: float) -> str:
    # A command asks for the same hash several times; a file that has changed since has another length or time.
    return file_sha256(file)


def require(module: str, extra: str, what: str) -> Any:
    """A module that an extra brings. Raises UserError where it is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        top = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != top:
            raise
        raise UserError(f"{what} is read with {top}, which is not installed: pip install 'llm_jax[{extra}]'") from None
