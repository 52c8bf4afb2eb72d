"""What a run of `kernels.py` has done so far, in a file.

A kernel that hangs or breaks the device takes its process with it; the next process reads here what is over.
"""

import faulthandler
import json
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any


class Journal:
    """Lines of JSON, each written at once. Within `patience` seconds of the last one, or the process ends."""

    def __init__(self, path: Path, patience: float):
        self.path, self.patience, self._lock = path, patience, threading.Lock()
        self.entries = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        self._begun = Counter(entry["begin"] for entry in self.entries if "begin" in entry)
        self._over = {entry["over"] for entry in self.entries if "over" in entry}

    def write(self, **entry: Any) -> None:
        with self._lock:
            self.entries.append(entry)
            with self.path.open("a") as file:
                file.write(json.dumps(entry) + "\n")
            if self.patience:
                faulthandler.dump_traceback_later(self.patience, exit=True)

    def recall(self, name: str, made: Any) -> Any:
        """What the first process of the run found, by calling `made`."""
        for entry in self.entries:
            if name in entry:
                return entry[name]
        self.write(**{name: made()})
        return self.entries[-1][name]

    def began(self, key: str) -> int:
        """How many processes began this and did not come to its end."""
        return 0 if key in self._over else self._begun[key]

    def is_over(self, key: str) -> bool:
        return key in self._over

    @property
    def ended(self) -> bool:
        return any("end" in entry for entry in self.entries)


def run_all(command: list[str], path: Path) -> int:
    """Processes one after another until one comes to the end of the run, or none gets further; its exit status."""
    got = -1
    while True:
        status = subprocess.call([*command, "--journal", str(path)])
        journal = Journal(path, 0)
        if journal.ended or len(journal.entries) <= got:
            return status if journal.ended else status or 1
        got = len(journal.entries)
        print(f"the process ended with status {status}; another one goes on", file=sys.stderr, flush=True)
