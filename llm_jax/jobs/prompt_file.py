"""Many prompts from a file to a file: a line per answer as it comes; begun again, the answers there are kept."""

import dataclasses
import fcntl
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from typing import IO, TYPE_CHECKING, Any, Self

from etils import epath

from llm_jax.base.errors import UserError
from llm_jax.base.logging import log
from llm_jax.data.tokenizers import Tokenizer
from llm_jax.inference.config import SamplingParams
from llm_jax.jobs.generate import Prompt, sample_line

if TYPE_CHECKING:
    from llm_jax.inference.generator import Generator

PROGRESS_SECONDS = 5.0


def settings_hash(params: SamplingParams, **more: Any) -> str:
    """8 hex digits over what the answers depend on beside their prompts; each line carries them."""
    fields = {"sampling": dataclasses.asdict(params), **more}
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()[:8]


class OutputFile:
    """A JSONL file that lines are added to, locked while it is open.

    Raises UserError for a file that another process writes, that holds other prompts' answers, or those of other
    settings.
    """

    def __init__(self, path: str, prompts: Sequence[Prompt], settings: str):
        self.path = epath.Path(path)
        self.settings = settings
        try:
            self._file: IO[bytes] = open(self.path, "a+b")  # noqa: SIM115
        except OSError as error:
            raise UserError(f"--output {path}: {error.strerror}") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise UserError(f"--output {path}: another process is writing it") from None
        self.done = self._read(prompts)

    def write(self, index: int, line: dict[str, Any]) -> None:
        text = json.dumps({"index": index, **line, "settings": self.settings}, ensure_ascii=False)
        self._file.write(text.encode("utf-8", "surrogateescape") + b"\n")
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def _read(self, prompts: Sequence[Prompt]) -> set[tuple[int, int]]:
        """`(index, sample)` of the answers that are there. A last line cut short is taken off."""
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        done = set()
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                row = json.loads(line)
                index, sample = row["index"], row["sample"]
                same = index < len(prompts) and row["prompt"] == prompts[index].content
                adapter = row.get("adapter")
                settings = row["settings"]
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{self.path}:{number} is no answer of this command; name another --output") from None
            if not same:
                raise UserError(f"{self.path}:{number} answers another prompt than --input has there")
            if adapter != prompts[index].adapter:
                raise UserError(f"{self.path}:{number} was made with another adapter than --input has there")
            if settings != self.settings:
                raise UserError(f"{self.path}:{number} was made with another model or other settings")
            done.add((index, sample))
        if len(whole) < len(content):
            self._file.truncate(len(whole))
        self._file.seek(0, 2)
        return done


def answer_prompts(
    open_generator: Callable[[], "Generator"],
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    ids: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
    output: OutputFile,
    by_row: bool,
) -> None:
    """Writes a line per sample that `output` lacks, in the order in which they are done: `index` is the prompt's.

    The model is opened if there are any; `by_row`: it has the prompts' adapters beside its weights.
    """
    wanted = {(i, sample) for i in range(len(prompts)) for sample in range(params[i].n)}
    missing = wanted - output.done
    left = sorted({i for i, _ in missing})
    if len(missing) < len(wanted):
        log(f"{len(wanted) - len(missing)} of {len(wanted)} answers are in {output.path} already")
    if not missing:
        return
    generator = open_generator()
    began = told = time.monotonic()
    written = tokens = 0
    adapters = [prompts[i].adapter for i in left] if by_row else None
    for done in generator.completions([ids[i] for i in left], [params[i] for i in left], adapters):
        index = left[done.prompt]
        if (index, done.sample) not in missing:
            continue
        output.write(index, sample_line(prompts[index], done, tokenizer))
        written, tokens, now = written + 1, tokens + len(done.tokens), time.monotonic()
        if now - told >= PROGRESS_SECONDS:
            rest = (now - began) / written * (len(missing) - written)
            log(f"{written} of {len(missing)} answers, {tokens / (now - began):.0f} tokens/s, about {rest:.0f} s left")
            told = now
    log(f"{written} answers, {tokens} tokens in {time.monotonic() - began:.1f} s, in {output.path}")
