"""TensorBoard events: checksums of the RFC, and TensorFlow reads the file."""

import pytest

from llm_jax.training.tensorboard import FILE, Events, crc32c


@pytest.mark.parametrize("data, checksum", [
    (b"123456789", 0xE3069283),  # the check value of CRC-32C
    (bytes(32), 0x8A9136AA),  # RFC 3720, B.4
    (bytes([255] * 32), 0x62A8AB43),
    (bytes(range(32)), 0x46DD794E),
])  # fmt: skip
def test_crc32c(data, checksum):
    assert crc32c(data) == checksum


def test_a_resumed_file_has_no_step_twice(tmp_path):
    lines = [{"step": step, "loss": 1.0 / step, "gone": None} for step in (1, 2, 300)]
    events = Events(tmp_path / "tensorboard", [])
    for line in lines:
        events.append(line)
    sizes = [(tmp_path / "tensorboard" / FILE).stat().st_size]
    events = Events(tmp_path / "tensorboard", lines[:2])
    events.append(lines[2])
    sizes.append((tmp_path / "tensorboard" / FILE).stat().st_size)
    assert sizes[0] == sizes[1]


@pytest.mark.slow
def test_tensorflow_reads_it(tmp_path):
    tensorflow = pytest.importorskip("tensorflow")
    events = Events(tmp_path, [{"step": 200, "epoch": 0.5, "eval_loss": 2.25, "gone": None}])
    events.append({"step": 70_000, "perf/tokens_per_s": 12345.0, "num_tokens": 7})
    read = [
        (event.step, {value.tag: value.simple_value for value in event.summary.value})
        for event in tensorflow.compat.v1.train.summary_iterator(str(tmp_path / FILE))
    ]
    assert read == [
        (0, {}),
        (200, {"epoch": 0.5, "eval_loss": 2.25}),
        (70_000, {"perf/tokens_per_s": 12345.0, "num_tokens": 7.0}),
    ]
