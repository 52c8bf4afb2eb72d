"""Where the lines of metrics.jsonl go besides: TensorBoard, W&B. One interface, `Logger`; a third is a line here."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from types import TracebackType
from typing import Any, Protocol, Self

from llm_jax.base import processes
from llm_jax.base.errors import UserError
from llm_jax.storage.workdir import Workdir
from llm_jax.training.config import LoggingConfig, WandbConfig
from llm_jax.training.tensorboard import Events
from llm_jax.training.wandb_run import WandbRun

Line = Mapping[str, Any]


class Logger(Protocol):
    """Takes each line once, in order, over any number of restarts."""

    def append(self, line: Line) -> None:
        """A line of metrics.jsonl: `step` and named numbers; None stands for what is not finite."""
        ...

    def close(self, failed: bool) -> None:
        """The command ends; `failed` unless its run is done."""
        ...


def check_logging(config: LoggingConfig) -> None:
    """Raises UserError for a logger that is not installed or named twice, and for fields of one that is not used."""
    names = config.report_to
    if len(set(names)) < len(names):
        raise UserError(f"logging.report_to={','.join(names)} names a logger twice")
    if "wandb" in names:
        if find_spec("wandb") is None:
            raise UserError("logging.report_to names wandb, which is not installed: pip install 'llm_jax[wandb]'")
    elif config.wandb != WandbConfig():
        raise UserError(f"logging.wandb.* is set, but logging.report_to={','.join(names)} does not name wandb")


class Loggers:
    """The loggers of a configuration, within `with Loggers(...) as loggers:`. Process 0 only."""

    def __init__(self, config: LoggingConfig, workdir: Workdir, name: str) -> None:
        self._config, self._workdir, self._name = config, workdir, name
        self._open: list[Logger] = []

    def start(self, before: Sequence[Line], kept: Sequence[Line]) -> None:
        """To be called once the run is restored.

        Args:
            before: the lines that the last command left.
            kept: those that are still there; the rest is run, and logged, again.
        """
        check_logging(self._config)
        if not processes.first():
            return
        if "tensorboard" in self._config.report_to:
            self._open.append(Events(self._workdir.path / "tensorboard", kept))
        if "wandb" in self._config.report_to:
            self._open.append(WandbRun(self._config.wandb, self._workdir, self._name, before, kept))

    def append(self, line: Line) -> None:
        for logger in self._open:
            logger.append(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for logger in self._open:
            logger.close(failed=kind is not None)
