"""W&B: one run of theirs for a workdir, however often it is stopped and continued. Needs the extra `wandb`."""

import json
import os
import secrets
import string
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from llm_jax.base.errors import UserError
from llm_jax.base.logging import log
from llm_jax.storage.atomic import write_atomically
from llm_jax.storage.remote import is_remote
from llm_jax.storage.workdir import Workdir
from llm_jax.training.config import WandbConfig

FILE = "wandb.json"
"""In the workdir: the id of the run, and the last line that it was sent."""

Line = Mapping[str, Any]


class WandbRun:
    """Sends lines to the run whose id the workdir keeps.

    A line that an earlier command sent is not sent again, also when a kill took its steps back and they are repeated
    (with equal numbers). Lines go by our own `step` and not by W&B's, which drops whatever comes late.

    Args:
        before: the lines that the last command left in metrics.jsonl, all of them sent.
        kept: those that were kept.

    Raises:
        UserError: W&B refuses the run, or cannot be reached.
    """

    def __init__(
        self, config: WandbConfig, workdir: Workdir, name: str, before: Sequence[Line], kept: Sequence[Line]
    ) -> None:
        import wandb

        file = workdir.path / FILE
        known = json.loads(file.read_text()) if file.exists() else None
        if known is None:
            # A run that logged elsewhere until now is sent from its beginning.
            known, unsent = {"id": _new_id(), "step": -1, "names": []}, kept
        else:
            known, unsent = _later(known, before), ()
        write_atomically(file, json.dumps(known))
        self._step: int = known["step"]
        self._names = frozenset(known["names"])
        local = tempfile.mkdtemp() if is_remote(workdir.path) else str(workdir.path)
        record = json.loads(workdir.config.read_text()) if workdir.config.exists() else {}
        offline = (config.mode or os.environ.get("WANDB_MODE")) == "offline"
        try:
            self._run = wandb.init(
                id=known["id"],
                resume=None if offline else "allow",
                project=config.project or os.environ.get("WANDB_PROJECT") or "llm_jax",
                name=config.name or name,
                entity=config.entity,
                group=config.group,
                tags=list(config.tags) or None,
                mode=config.mode,
                dir=local,
                config={"job": record.get("job"), "hash": record.get("hash"), **record.get("config", {})},
                # Its own lines and its copy of ours would break the progress line.
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.Error as error:
            raise UserError(f"W&B: {error}; logging.wandb.mode=offline needs no network") from None
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        if offline:
            log(f"W&B run {known['id']} is offline; to upload it: wandb sync {local}/wandb/offline-run-*")
        else:
            log(f"W&B run {known['id']}: {self._run.url}")
        for line in unsent:
            self.append(line)

    def append(self, line: Line) -> None:
        step = line["step"]
        if step < self._step:
            return
        sent = self._names if step == self._step else frozenset()
        values = {name: value for name, value in line.items() if name not in sent and value is not None}
        if values.keys() - {"step", "epoch"}:
            self._run.log({"step": step, **values})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=1 if failed else 0)


def _later(known: Mapping[str, Any], lines: Sequence[Line]) -> dict[str, Any]:
    """The record of what was sent, brought up to `lines`."""
    step = max((line["step"] for line in lines), default=-1)
    if step < known["step"]:
        return dict(known)
    names = {name for line in lines if line["step"] == step for name in line if name != "step"}
    names |= set(known["names"]) if step == known["step"] else set()
    return {"id": known["id"], "step": step, "names": sorted(names)}


def _new_id() -> str:
    """As W&B makes them: eight lower-case letters and digits."""
    return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))
