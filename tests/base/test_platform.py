"""The platform that is chosen before JAX looks for one."""

import importlib.util
import os
from pathlib import Path

import pytest

from llm_jax.base import platform


@pytest.mark.parametrize(
    "installed, vendors, gpu, given, chosen",
    [
        ({"libtpu"}, ["0x1af4"], False, {}, "cpu"),
        ({"libtpu"}, [], False, {}, "cpu"),
        ({"libtpu"}, ["0x1af4", "0x1ae0"], False, {}, None),
        ({"libtpu"}, [], False, {"TPU_NAME": "pod"}, None),
        ({"libtpu"}, [], False, {"JAX_PLATFORMS": "tpu"}, "tpu"),
        (set(), [], False, {}, None),
        ({"libtpu", "jax_plugins"}, [], True, {}, "cuda,cpu"),
        ({"libtpu", "jax_plugins"}, [], False, {}, "cpu"),
    ],
)
def test_choice(monkeypatch, tmp_path: Path, installed, vendors, gpu, given, chosen):
    for number, vendor in enumerate(vendors):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "vendor").write_text(vendor + "\n")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in installed else None)
    monkeypatch.setattr(platform, "_DEVICES", tmp_path)
    monkeypatch.setattr(platform, "_GPUS", (tmp_path if gpu else tmp_path / "absent",))
    for name in ("JAX_PLATFORMS", "TPU_NAME", "TPU_WORKER_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    platform.choose_platform()
    assert os.environ.get("JAX_PLATFORMS") == chosen
