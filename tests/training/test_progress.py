"""Speed and the share of peak by hand-made clocks, and the line a person reads."""

from types import SimpleNamespace

import pytest

from llm_jax.training import progress
from llm_jax.training.peaks import peak_flops
from llm_jax.training.progress import Meter, ProgressLine


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(time=100.0)
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now.time)
    return now


def device(kind, in_use=2_500_000_000):
    return SimpleNamespace(device_kind=kind, memory_stats=lambda: {"peak_bytes_in_use": in_use})


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
    assert meter.take() == {"perf/first_step_time": 30, "perf/peak_memory_gb": 2.5}
    clock.time += 2
    meter.step_done(0)
    assert meter.take() == {"perf/step_time": 2, "perf/peak_memory_gb": 2.5}


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
