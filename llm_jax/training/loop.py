"""The one training loop: restore or start, then step, log, evaluate and save until the last step.

Steps are numbered by how many are done: step 1 reads the loader's batch 0. A killed run that is started again repeats
the uninterrupted one bit for bit: the loader is a function of the step, the state holds everything else, and the
checkpoint also holds what metrics.jsonl would have averaged next.
"""

import json
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import numpy as np

from llm_jax.base import processes
from llm_jax.base.door import disk_failure
from llm_jax.base.errors import RunError, UserError
from llm_jax.base.logging import log, warn
from llm_jax.sharding.placement import Batches, place, place_batch, row_part
from llm_jax.sharding.plan import Plan
from llm_jax.storage.checkpoints import Checkpoints, named_leaves
from llm_jax.storage.workdir import Workdir
from llm_jax.training.config import LoggingConfig, ProfileConfig, TrainConfig
from llm_jax.training.goodput import RunClock
from llm_jax.training.loggers import Loggers
from llm_jax.training.metrics import Accumulator, MetricsFile, read_metrics
from llm_jax.training.profile import Profiler, profiled_steps
from llm_jax.training.progress import Meter, ProgressLine
from llm_jax.training.report import write_report
from llm_jax.training.stop import StopSignal

State = Any
Metrics = Mapping[str, Any]
Layout = Mapping[str, Any]

# Steps that may be under way on the device before the host looks at a result: enough to keep the device busy.
_IN_FLIGHT = 1


class BatchSource(Batches, Protocol):
    """`data.Loader`."""

    def indices(self, step: int) -> Any:
        """The rows of a batch."""
        ...


@dataclass(frozen=True)
class TrainingJob:
    """What differs from one job to the next."""

    name: str
    """For the terminal."""
    workdir: Workdir
    config: TrainConfig
    plan: Plan
    abstract_state: State
    """ShapeDtypeStructs with shardings, of any pytree."""
    init: Callable[[], State]
    """The state of step 0; called only where there is no checkpoint."""
    train_step: Callable[[State, Any], tuple[State, dict[str, Any]]]
    """Donates the state. Its metrics are scalars; `finite` False means that the state was left as it was."""
    loader: BatchSource
    rows: int
    """Rows of the training set, for `epoch`."""
    made_again: Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    """Parts of the state, by key, that no step changes and checkpoints leave out, and how each is made where a run goes
    on."""
    evaluate: Callable[[State], Metrics] | None = None
    """Named `eval_…`; every eval_every steps and after the last."""
    finish: tuple[Callable[[State], Metrics], ...] = ()
    """Run once, after the last checkpoint: evaluations too long to repeat, samples."""
    layout: Layout = field(default_factory=dict)
    """How parameters are grouped (`models.layout`)."""
    regroup: Callable[[dict[str, Any], Layout, Layout], dict[str, Any]] | None = None
    """`models.regroup`: a params-shaped nested dict of np arrays from one layout to another."""
    flops_per_token: float | None = None
    """Of a training step, for the share of peak and `total_flos`."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)


def train(job: TrainingJob) -> State:
    """Trains from the newest good checkpoint, or from the start, to `config.steps`; returns the final state.

    Leaves metrics.jsonl, what other loggers write, checkpoints and report.html in the workdir, whose lock the caller
    holds.
    Raises Interrupted after SIGTERM or Ctrl-C with everything saved; RunError where a step is not finite or a save
    fails; UserError where the batch does not fit the mesh or the checkpoints do not fit the job.
    """
    check_train_config(job.config, job.plan)
    profiler = Profiler(profiled_steps(job.profile, job.config.steps), job.workdir.path / "profile")
    checkpoint = job.config.checkpoint
    checkpoints = Checkpoints(
        job.workdir.checkpoints,
        checkpoint.keep_last,
        checkpoint.keep_best,
        checkpoint.best_metric.endswith("loss"),
        together=True,
    )
    if (watch := processes.watch()) is not None:
        watch.epilogue = lambda: f"; {checkpoints.last_good()}"
    progress = ProgressLine(job.name, job.config.steps)
    try:
        with (
            StopSignal() as stop,
            MetricsFile(job.workdir.metrics) as metrics,
            Loggers(job.logging, job.workdir, job.name) as loggers,
        ):
            return _train(job, checkpoints, progress, stop, metrics, loggers, profiler)
    except Exception as error:
        if isinstance(error, OSError | RuntimeError) and (reason := disk_failure(error)) is not None:
            checkpoints.close()
            raise RunError(f"{reason}; {checkpoints.last_good()}") from error
        processes.suspect(error)
        raise
    finally:
        profiler.close()
        progress.close()
        checkpoints.close()
        try:
            if processes.first():
                write_report(job.workdir)
        except (OSError, UserError) as error:  # A full disk, say; what ended the run is the better message.
            warn(f"{job.workdir.report} was not written: {error}")


def check_least(config: Any, where: str, least: Mapping[str, int]) -> None:
    """Raises UserError for the first field that is below its least value, or beyond 32 bits; None is not."""
    for name, bound in least.items():
        value = getattr(config, name)
        if value is not None and value < bound:
            raise UserError(f"{where}.{name} is {value}; it must be at least {bound}")
        bits = 32 if name == "seed" else 31
        if value is not None and value >= 2**bits:
            raise UserError(f"{where}.{name} is {value}; it must be below 2**{bits}")


def check_train_config(config: TrainConfig, plan: Plan) -> None:
    """Raises UserError where a number is out of range, microbatches do not divide the batch, the mesh does not divide
    a microbatch, or checkpoints are to be ranked by evaluations that do not take place."""
    positive = ("steps", "batch_size", "microbatches", "log_every", "eval_batches")
    check_least(config, "train", dict.fromkeys(positive, 1) | {"eval_every": 0, "seed": 0})
    check_least(config.checkpoint, "train.checkpoint", {"every": 1, "keep_last": 1, "keep_best": 0})
    if config.batch_size % config.microbatches:
        raise UserError(
            f"train.microbatches={config.microbatches} does not divide train.batch_size={config.batch_size}"
        )
    rows = config.batch_size // config.microbatches
    axes = [axis for axis in plan.activation_spec(("batch",)) if axis is not None]
    for axis in axes:
        if rows % plan.axis_size(axis):
            raise UserError(
                f"mesh.{axis}={plan.axis_size(axis)} does not divide the {rows} rows of a microbatch "
                f"(train.batch_size={config.batch_size}, train.microbatches={config.microbatches})"
            )
    every, best = config.checkpoint.every, config.checkpoint.best_metric
    if config.checkpoint.keep_best and not best.startswith("eval_"):
        raise UserError(f"train.checkpoint.best_metric={best} is no evaluation metric; those begin with eval_")
    if config.checkpoint.keep_best and (config.eval_every == 0 or every % config.eval_every):
        raise UserError(
            f"train.checkpoint.keep_best ranks by evaluation: train.checkpoint.every={every} must be a multiple of "
            f"train.eval_every={config.eval_every}"
        )


def _train(
    job: TrainingJob,
    checkpoints: Checkpoints,
    progress: ProgressLine,
    stop: StopSignal,
    metrics: MetricsFile,
    loggers: Loggers,
    profiler: Profiler,
) -> State:
    config = job.config
    before = read_metrics(job.workdir.metrics)
    start, state, accumulator, spent = _restore(job, checkpoints, metrics)
    loggers.start(before, read_metrics(job.workdir.metrics))
    clock = RunClock(spent, before)
    meter = Meter(job.flops_per_token, list(job.plan.mesh.devices.flat), config.compute_dtype, clock)
    part = row_part(job.plan)
    in_flight: deque[tuple[int, dict[str, Any]]] = deque()

    def settle(allowed: int) -> None:
        while len(in_flight) > allowed:
            step, outcome = in_flight.popleft()
            outcome = jax.device_get(outcome)
            if not outcome.pop("finite", True):
                raise _not_finite(job, checkpoints, step, outcome)
            accumulator.add(outcome)
            meter.step_done(float(outcome.get("num_tokens", 0)))

    def write(step: int, values: Metrics) -> None:
        line = {"epoch": round(step * config.batch_size / job.rows, 4)} | dict(values)
        if job.flops_per_token is not None and "num_tokens" in values:
            line["total_flos"] = values["num_tokens"] * job.flops_per_token
        loggers.append(metrics.append(step, line))

    batches = job.loader.iterate(start, config.steps, part) if start < config.steps else iter(())
    profiler.begin(start)
    for step in range(start + 1, config.steps + 1):
        with meter.waiting(outcome for _, outcome in in_flight):
            batch = next(batches)
        with profiler.step(step):
            state, outcome = job.train_step(state, place_batch(batch, job.plan, part))
        in_flight.append((step, outcome))
        checkpoints.check()

        last, stopping = step == config.steps, stop.due(step)
        log_due = last or step % config.log_every == 0
        evaluation_due = last or (config.eval_every > 0 and step % config.eval_every == 0)
        save_due = last or stopping or step % config.checkpoint.every == 0
        # The first step compiles; the clock of the others starts when it is over.
        first = step == start + 1
        settle(0 if first or log_due or evaluation_due or save_due or profiler.at_edge(step) else _IN_FLIGHT)
        with meter.paused():
            profiler.after(step)

        if log_due:
            line = accumulator.take() | meter.take()
            write(step, line)
            progress.show(step, line)
        evaluation: Metrics = {}
        if job.evaluate is not None and evaluation_due:
            with meter.paused() as pause:
                evaluation = job.evaluate(state)
            write(step, {**evaluation, "perf/eval_time": pause.seconds})
            progress.note(step, evaluation)
        if save_due:
            meta = {
                "layout": job.layout,
                "accumulator": accumulator.saved(),
                "metrics_lines": metrics.lines,
                "clock": clock.saved(meter.in_steps()),
            }
            with meter.saving():
                metrics.flush()
                checkpoints.save(step, _kept(job, state), meta, _ranking(config, evaluation))
        if stopping:
            break

    checkpoints.wait()
    saved = max(checkpoints.steps(), default=0)
    stop.interrupt_with(f"step {saved} is saved in {job.workdir}; the same command continues")
    for hook in job.finish:
        values = hook(state)
        if values:
            write(config.steps, values)
            progress.note(config.steps, values)
    clock.stop()
    return state


def _restore(
    job: TrainingJob, checkpoints: Checkpoints, metrics: MetricsFile
) -> tuple[int, State, Accumulator, Mapping[str, float] | None]:
    """Where to go on: the step, its state, and the metrics of the unfinished interval, all as if never stopped; and
    the time spent so far (`RunClock.saved`)."""
    checkpoints.clean()
    step = checkpoints.newest_good()
    if step is None:
        metrics.cut(step=0, lines=0)
        return 0, job.init(), Accumulator(), None
    if step > job.config.steps:
        raise UserError(f"{checkpoints.path(step)} is past train.steps={job.config.steps}")
    checkpoints.clean(newer_than=step)
    meta = checkpoints.read_meta(step)
    layout = json.loads(json.dumps(job.layout))
    wanted = _kept(job, job.abstract_state)
    if meta["layout"] == layout:
        restored = checkpoints.restore(wanted, step)
        assert restored is not None, "a given step is restored or raises"
        state = restored[1]
    else:
        state = _place(_regroup(job, checkpoints.restore_numpy(step), meta["layout"], layout), wanted)
    if job.made_again:
        state = {**state, **{key: make() for key, make in job.made_again.items()}}
    metrics.cut(step, meta["metrics_lines"])
    log(f"{job.name}: continuing from step {step}")
    # Absent from checkpoints of before there was a clock.
    return step, state, Accumulator(meta["accumulator"]), meta.get("clock")


def _kept(job: TrainingJob, state: State) -> State:
    """What checkpoints hold of a state."""
    return {key: part for key, part in state.items() if key not in job.made_again} if job.made_again else state


def _regroup(job: TrainingJob, tree: Any, before: Layout, after: Layout) -> Any:
    """Regroups every params-shaped subtree (parameters of any role, optimizer moments), known by its `segments`."""
    if job.regroup is None:
        raise UserError(f"the checkpoints in {job.workdir} group layers differently than this run")
    if not isinstance(tree, dict):
        return tree
    if "segments" in tree:
        return job.regroup(tree, before, after)
    return {key: _regroup(job, child, before, after) for key, child in tree.items()}


def _place(tree: dict[str, Any], abstract_state: State) -> State:
    host, wanted = named_leaves(tree), named_leaves(abstract_state)
    for name in sorted(set(host) ^ set(wanted)):
        raise UserError(f"after regrouping, the checkpoint and this run differ in the array {name}")
    for name, leaf in wanted.items():
        if (host[name].shape, host[name].dtype) != (leaf.shape, leaf.dtype):
            raise UserError(f"after regrouping, {name} is {host[name].dtype}{list(host[name].shape)}, not {leaf}")
    arrays = [place(host[name], leaf.sharding) for name, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(abstract_state), arrays)


def _ranking(config: TrainConfig, evaluation: Metrics) -> float | None:
    name = config.checkpoint.best_metric
    if config.checkpoint.keep_best and evaluation and name not in evaluation:
        known = ", ".join(evaluation)
        raise UserError(f"train.checkpoint.best_metric={name} is not a metric of the evaluation; those are: {known}")
    return evaluation.get(name)


def _not_finite(job: TrainingJob, checkpoints: Checkpoints, step: int, outcome: Metrics) -> RunError:
    checkpoints.wait()
    numbers = ", ".join(f"{name} {float(outcome[name]):.4g}" for name in ("loss", "grad_norm") if name in outcome)
    rows = " ".join(str(index) for index in np.ravel(job.loader.indices(step - 1)))
    return RunError(f"step {step} is not finite ({numbers}); its rows: {rows}; {checkpoints.last_good()}")
