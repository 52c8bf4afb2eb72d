"""A disk that fills up, or can no longer be written to, just before one kind of file is written: a real one, a small
tmpfs, which a hook fills with ballast or mounts read-only at that moment."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


class Disk:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fill(self) -> None:
        """Leaves no byte, and no page for a file that is already there to grow into."""
        with open(self.folder / "ballast", "wb") as f, contextlib.suppress(OSError):
            while True:
                f.write(b"\0" * 4096)
                f.flush()

    def forbid(self) -> None:
        """Makes it read-only, as a kernel does after an error of the device; open files or not."""
        subprocess.run(["mount", "-o", "remount,ro", self.folder], check=True, capture_output=True)

    def mend(self) -> None:
        subprocess.run(["mount", "-o", "remount,rw", self.folder], capture_output=True)
        with contextlib.suppress(FileNotFoundError):
            (self.folder / "ballast").unlink()


@contextlib.contextmanager
def small_disk(folder: Path, size: str = "64m") -> Iterator[Disk]:
    """A tmpfs at `folder`. Skips the test where none may be mounted."""
    folder.mkdir()
    if os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("mounting a tmpfs needs root")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        yield Disk(folder)
    finally:
        subprocess.run(["umount", "-l", folder], check=True)
