"""Runs a command with `fake://` known (`tests.storage.fake_store`), in the store that FAKE_STORE names.

python tests/storage/on_fake_store.py MODULE ARGUMENT...
"""

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import tests.storage.fake_store  # noqa: F401

if __name__ == "__main__":
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
