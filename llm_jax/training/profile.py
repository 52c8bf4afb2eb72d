"""A trace of some steps, on request: `profile.steps=START:STOP`. For xprof, and for Perfetto."""

import contextlib
import re
import tempfile
from collections.abc import Iterator

import jax
from etils import epath

from llm_jax.base import processes
from llm_jax.base.errors import UserError
from llm_jax.base.logging import log, warn
from llm_jax.storage.remote import copy_file, files_below, is_remote
from llm_jax.training.config import ProfileConfig

STEP = "train"
"""Name of the annotation that each step has in a trace, with its `step_num`."""


def profiled_steps(config: ProfileConfig, steps: int) -> range:
    """The steps that are traced, empty for none. Raises UserError for a range that is none, or not of this run."""
    if config.steps is None:
        return range(0)
    found = re.fullmatch(r"(\d+):(\d+)", config.steps)
    if found is None:
        raise UserError(f"profile.steps={config.steps} is not START:STOP, two whole numbers")
    start, stop = int(found[1]), int(found[2])
    if not 1 <= start < stop:
        raise UserError(f"profile.steps={config.steps} holds no step; START is at least 1, STOP is greater")
    if stop > steps + 1:
        raise UserError(f"profile.steps={config.steps} goes past train.steps={steps}; STOP is at most {steps + 1}")
    return range(start, stop)


class Profiler:
    """Traces the steps of a range, those that this command runs. Process 0 only.

    Args:
        steps: from `profiled_steps`.
        folder: gets `plugins/profile/step_N/`, N the first, with an xplane.pb for xprof and a perfetto_trace.json.gz.
    """

    def __init__(self, steps: range, folder: epath.Path) -> None:
        self._steps = steps
        self._folder = folder
        self._local: str | None = None
        self._first = 0
        self._last = 0

    def at_edge(self, step: int) -> bool:
        """Whether a trace begins or ends after this step, so that it has to be over and done."""
        return bool(self._steps) and step in (self._steps.start - 1, self._steps.stop - 1)

    def after(self, step: int) -> None:
        """To be called after each step, with nothing under way at an edge; first after the step that is restored."""
        if self._local is not None:
            self._last = step
            if step >= self._steps.stop - 1:
                self._stop()
        elif step + 1 in self._steps and processes.first():
            self._start(step + 1)

    def begin(self, step: int) -> None:
        """`after` the step that a run goes on from, which may be in or past the range."""
        if self._steps and step >= self._steps.stop - 1:
            warn(f"steps {self._steps.start} to {self._steps.stop - 1} are done already: no profile of them")
        self.after(step)

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Marks what a step does, on the host and on the devices."""
        with jax.profiler.StepTraceAnnotation(STEP, step_num=step):
            yield

    def close(self) -> None:
        """Ends a trace that a signal or an error cut short."""
        if self._local is not None:
            self._stop()

    def _start(self, step: int) -> None:
        options = jax.profiler.ProfileOptions()
        # Every Python call would be most of the trace, and slow what it measures.
        options.python_tracer_level = 0
        options.session_id = f"step_{step:08d}"
        self._local = tempfile.mkdtemp() if is_remote(self._folder) else str(self._folder)
        self._first = self._last = step
        jax.profiler.start_trace(self._local, create_perfetto_trace=True, profiler_options=options)

    def _stop(self) -> None:
        assert self._local is not None
        jax.profiler.stop_trace()
        if self._local != str(self._folder):
            for name, file in files_below(epath.Path(self._local)):
                copy_file(file, self._folder / name)
        self._local = None
        log(
            f"profile of steps {self._first} to {self._last} in {self._folder}; to read it: xprof --logdir "
            f"{self._folder}, or load its perfetto_trace.json.gz at https://ui.perfetto.dev"
        )
