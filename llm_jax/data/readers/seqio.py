"""seqio tasks and mixtures: `seqio:MODULE:NAME[:SPLIT]`, the split `train` where none is named.

MODULE is imported, which registers what it defines; NAME is looked up. Elements become records by their features:
`text`, or `targets` alone, is a text; `inputs` and `targets` are a prompt and its completion. Where these are token
ids, `inputs_pretokenized` and `targets_pretokenized` are taken, which seqio's `tokenize` keeps by default.
A mixture is seqio's own, with its rates, and ends when the first of its tasks does.
"""

import functools
import importlib
import inspect
import itertools
import os
from collections.abc import Iterator
from typing import Any

from llm_jax.base.errors import UserError
from llm_jax.base.nearest import nearest
from llm_jax.data.readers.base import Reader, Record, require
from llm_jax.storage.hashes import file_sha256

PREFIX = "seqio:"
FORM = "seqio:MODULE:NAME or seqio:MODULE:NAME:SPLIT"
SEED = 0


class SeqioReader(Reader):
    """One split of a task or mixture, unshuffled, on the fly (seqio's own cache is not used).

    Raises:
      UserError: the module does not import, or has no such task, mixture or split.
    """

    def __init__(self, path: str):
        parts = path.removeprefix(PREFIX).split(":")
        if len(parts) not in (2, 3) or not all(parts):
            raise UserError(f"data path {path} has to be {FORM}")
        self.path = path
        self.module, self.name, self.split = *parts, *["train"][: 3 - len(parts)]
        self.source = _provider(self.module, self.name, path)
        splits = sorted({split for task in self._tasks() for split in task.splits})
        if self.split not in splits:
            raise UserError(f"{path}: no split {self.split!r}; there are {', '.join(splits)}")

    def records(self, start: int = 0) -> Iterator[Record]:
        name = f"{self.path.removesuffix(':' + self.split)}, {self.split} example"
        number = start
        try:
            for number, element in enumerate(self._dataset().skip(start).as_numpy_iterator(), start + 1):
                where = f"{name} {number}"
                yield Record(where, _record(element, where))
        except Exception as error:
            if not _is_of_tensorflow(error):
                raise
            raise UserError(f"{name} {number + 1}: {_first_line(error)}") from None

    def count(self) -> int:
        return sum(1 for _ in self._dataset().as_numpy_iterator())

    def hashes(self) -> list[list[str]]:
        """The module's source, the split, and the files of sources made of files; not what else these read."""
        import seqio

        made = [[f"{PREFIX}{self.name}:{self.split}", _module_hash(self.module)]]
        rates = [[name, repr(rate)] for name, rate in sorted(getattr(self.source, "_task_to_rate", {}).items())]
        made += [rate for rate in rates if "0x" not in rate[1]]  # a function's address changes with every start
        for task in self._tasks():
            if self.split in task.splits:
                made.append([task.name, type(task.source).__name__])
                for shard in task.source.list_shards(self.split):
                    is_file = isinstance(task.source, seqio.FileDataSource) and os.path.exists(shard)
                    made.append([os.path.basename(shard), file_sha256(shard) if is_file else ""])
        return made

    def _tasks(self) -> list[Any]:
        return sorted(getattr(self.source, "tasks", [self.source]), key=lambda task: task.name)

    def _dataset(self) -> Any:
        import seqio
        import tensorflow as tf

        tf.random.set_seed(SEED)
        sources = [task.source for task in self._tasks()]
        # A function that makes a dataset may take no seed; seqio refuses one for it.
        functions = [s._dataset_fn for s in sources if isinstance(s, seqio.FunctionDataSource)]
        seeded = all("seed" in inspect.signature(function).parameters for function in functions)
        options: dict[str, Any] = {"split": self.split, "shuffle": False, "seed": SEED if seeded else None}
        if isinstance(self.source, seqio.Mixture):
            options["copy_pretokenized"] = True
        try:
            return self.source.get_dataset(
                sequence_length=None, num_epochs=1, trim_output_features=False, try_in_mem_cache=False, **options
            )
        except (ValueError, TypeError, KeyError, OSError, tf.errors.OpError) as error:
            raise UserError(f"{self.path}: {_first_line(error)}") from None


@functools.cache
def _provider(module: str, name: str, path: str) -> Any:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    seqio = require("seqio", "seqio", f"data path {path}")
    _leave_accelerators()
    try:
        importlib.import_module(module)
    except Exception as error:
        raise UserError(f"{path}: the module {module} does not import: {_first_line(error)}") from None
    known = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
    if name not in known:
        near = nearest(name, sorted(known))
        hint = f"; the nearest is {near}" if near else ""
        raise UserError(f"{path}: no task or mixture {name!r} once {module} is imported{hint}")
    return seqio.get_mixture_or_task(name)


def _leave_accelerators() -> None:
    """Keeps TensorFlow from taking the memory of a GPU that JAX trains on."""
    import tensorflow as tf

    for device in itertools.chain(tf.config.list_physical_devices("GPU"), tf.config.list_physical_devices("TPU")):
        if device in tf.config.get_visible_devices():
            tf.config.set_visible_devices([], device.device_type)


@functools.cache
def _module_hash(module: str) -> str:
    source = inspect.getsourcefile(importlib.import_module(module))
    return "" if source is None else file_sha256(source)


def _record(element: Any, where: str) -> dict[str, str]:
    for names in ({"text": "text"}, {"inputs": "prompt", "targets": "completion"}, {"targets": "text"}):
        found = {ours: _text(element, name, where) for name, ours in names.items() if name in element}
        if len(found) < len(names):
            continue
        if found.get("prompt") == "":  # T5's way to write a text
            return {"text": found["completion"]}
        return found
    raise UserError(f"{where}: has none of the features text, targets, or inputs and targets, but {', '.join(element)}")


def _text(element: Any, name: str, where: str) -> str:
    value = element[name]
    if not isinstance(value, bytes):
        value = element.get(f"{name}_pretokenized")
    if not isinstance(value, bytes):
        raise UserError(
            f"{where}: {name} is no text, and no {name}_pretokenized is beside it: leave out the preprocessor that"
            " tokenizes, or give it copy_pretokenized"
        )
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: {name} is not UTF-8 (byte 0x{value[error.start]:02x})") from None


def _is_of_tensorflow(error: Exception) -> bool:
    import tensorflow as tf

    return isinstance(error, tf.errors.OpError)


def _first_line(error: Exception) -> str:
    """`Type: message`, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    # TensorFlow puts a traceback before the message of what fails while a preprocessor is traced.
    text = lines[-1] if lines[0] == "in user code:" else lines[0]
    name = type(error).__name__
    return text if text.startswith(name) else f"{name}: {text}"
