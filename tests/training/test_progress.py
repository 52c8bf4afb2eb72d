"""Speed and the share of peak by hand-made clocks, and the line a person reads."""

from types import SimpleNamespace

import pytest

from llm_jax.training import goodput, progress
from llm_jax.training.goodput import RunClock, process_age
from llm_jax.training.peaks import peak_flops
from llm_jax.training.progress import Meter, ProgressLine


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(time=100.0)
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now.time)
    monkeypatch.setattr(goodput, "_free_since", 90.0)
    return now


def device(kind, in_use=2_500_000_000):
    return SimpleNamespace(device_kind=kind, process_index=0, memory_stats=lambda: {"peak_bytes_in_use": in_use})


@pytest.mark.parametrize(
    "kind, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989.5e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("cpu", None),
    ],
)
def test_peaks(kind, peak):
    assert peak_flops(device(kind), "bfloat16") == peak
    assert peak_flops(device(kind), "float32") is None


def test_first_step_and_pauses_do_not_count(clock):
    meter = Meter(1e9, [device("NVIDIA A100-SXM4-40GB")] * 2, "bfloat16")
    clock.time += 30  # compiles
    meter.step_done(1000)
    for _ in range(4):
        clock.time += 0.5
        meter.step_done(1000)
        with meter.paused():
            clock.time += 60
    figures = meter.take()
    assert figures["perf/step_time"] == pytest.approx(0.5)
    assert figures["perf/tokens_per_s"] == pytest.approx(2000)
    assert figures["perf/mfu"] == pytest.approx(2000 * 1e9 / (2 * 312e12))
    assert figures["perf/peak_memory_gb"] == 2.5


def test_a_line_after_the_first_step_says_how_long_it_took(clock):
    meter = Meter(None, [device("cpu")], "float32")
    clock.time += 30
    meter.step_done(0)
    always = {"perf/peak_memory_gb": 2.5, "perf/wall_time": 40, "perf/goodput": 0}
    assert meter.take() == always | {"perf/first_step_time": 30}
    clock.time += 2
    meter.step_done(0)
    always |= {"perf/wall_time": 42, "perf/goodput": 2 / 42}
    assert meter.take() == always | {"perf/step_time": 2, "perf/data_wait": 0}


def test_productive_are_steps_without_their_waits(clock):
    """Ten seconds before the run, 30 compile; then of each 2 s step half a second is a wait, and saves take 5."""
    run = RunClock()
    meter = Meter(None, [device("cpu")], "float32", run)
    idle, busy = ([SimpleNamespace(is_ready=lambda answer=answer: answer)] for answer in (True, False))
    clock.time += 30
    meter.step_done(0)
    for _ in range(4):
        for under_way in (idle, busy):
            with meter.waiting(under_way):
                clock.time += 0.5
        clock.time += 1
        meter.step_done(0)
    with meter.saving():
        clock.time += 5
    assert run.saved(meter.in_steps()) == {"productive": 6, "wall": 53}
    figures = meter.take()
    assert figures["perf/data_wait"] == 0.5 and figures["perf/save_time"] == 5
    assert figures["perf/wall_time"] == 53 and figures["perf/goodput"] == pytest.approx(6 / 53)
    assert "perf/save_time" not in meter.take()


def test_goodput_over_restarts(clock, monkeypatch):
    """The checkpoint was written after 100 s of which 80 were steps; the command went on for 50 s that a kill undid."""
    monkeypatch.setattr(goodput, "_free_since", 95.0)
    run = RunClock({"productive": 80.0, "wall": 100.0}, [{"perf/wall_time": 90.0}, {"perf/wall_time": 150.0}, {}])
    assert run.wall() == 155
    clock.time += 45
    run.add(20)
    assert run.figures() == {"perf/wall_time": 200, "perf/goodput": 0.5}
    run.stop()
    clock.time += 1
    assert RunClock().wall() == 1, "the next run of the same command starts where this one ended"


def test_process_age():
    assert 0 < process_age() < 24 * 3600


def test_the_line(capsys):
    line = {"loss": 2.34567, "perf/tokens_per_s": 12345.0, "perf/mfu": 0.413, "perf/peak_memory_gb": 3.21}
    bar = ProgressLine("sft", 1000)
    bar.show(120, line | {"perf/step_time": 4.5})
    bar.note(120, {"eval_loss": 2.5, "perf/eval_time": 1.0})
    bar.show(1000, line)
    assert capsys.readouterr().err.splitlines() == [
        "sft 120/1000 · loss 2.3457 · 12.3k tokens/s · 41% of peak · 3.2 GB · 1:06:00 left",
        "sft 120/1000: eval_loss 2.5",
        "sft 1000/1000 · loss 2.3457 · 12.3k tokens/s · 41% of peak · 3.2 GB",
    ]
