"""What answers prompts: a protocol that our decoder fulfils now, and that an engine can take over."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Protocol

from etils import epath

from llm_jax.base.errors import UserError
from llm_jax.data import chat
from llm_jax.data.tokenizers import Tokenizer
from llm_jax.inference.config import SamplingParams
from llm_jax.inference.generator import Completion
from llm_jax.jobs.alignment.prompts import Prompt
from llm_jax.storage.growing import GrowingFile
from llm_jax.storage.hashes import canonical_hash


class Sampler(Protocol):
    """Draws answers from one set of weights. `inference.Generator` is one."""

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Completion]:
        """Completions of prompts of token ids in their order, the `n` samples of a prompt one after the other.

        A pure function of arguments and weights, to the bit. Raises UserError for prompts or parameters out of range.
        """
        ...


def encode(tokenizer: Tokenizer, prompt: Prompt, prefix: str = "") -> list[int]:
    """Ids of a prompt as a preference job will encode it, then those of an answer's beginning.

    Both are one text, so that tokens at their border are those that training sees. Raises UserError, which names the
    prompt, where the chat template refuses it.
    """
    if isinstance(prompt.content, str):
        return tokenizer.encode(prompt.content + prefix, add_special_tokens=True)
    try:
        text = chat.render_text(tokenizer, prompt.content, add_generation_prompt=True)
    except UserError as error:
        raise UserError(f"{prompt.where}: {error}") from None
    return tokenizer.encode(text + prefix)


class Journal:
    """A sampler whose answers are written down as they come, and read back instead of being drawn a second time.

    A maker calls a sampler in a fixed order, so that call i of a chunk that was cut short is call i of the next try.

    Args:
      sampler: draws what is not in the file.
      file: a line a call; a last line cut short by a kill is taken off.
    """

    def __init__(self, sampler: Sampler, file: epath.Path):
        self._sampler, self._path = sampler, file
        self._lines = _whole_lines(file)
        self._file = GrowingFile(file)
        self._calls = 0

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Completion]:
        """As `Sampler.generate`. Raises UserError where the file holds the answers to something else."""
        each = [params] if isinstance(params, SamplingParams) else params
        request = canonical_hash([[list(map(int, ids)) for ids in prompts], [dataclasses.asdict(p) for p in each]])
        call, self._calls = self._calls, self._calls + 1
        if call < len(self._lines):
            line = json.loads(self._lines[call])
            if line["request"] != request:
                raise UserError(f"{self._path}:{call + 1} answers another request than this version makes: remove it")
            return [Completion(**{**c, "top_logprobs": _pairs(c["top_logprobs"])}) for c in line["completions"]]
        drawn = self._sampler.generate(prompts, params)
        line = {"request": request, "completions": [dataclasses.asdict(done) for done in drawn]}
        self._file.append(json.dumps(line).encode() + b"\n")
        return drawn

    def close(self) -> None:
        """Everything that was drawn is stored."""
        self._file.flush()


def _pairs(stored: list[list[list[float]]]) -> list[list[tuple[int, float]]]:
    return [[(int(token), logprob) for token, logprob in place] for place in stored]


def _whole_lines(file: epath.Path) -> list[bytes]:
    if not file.exists():
        return []
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        file.write_bytes(whole)
    return whole.splitlines()
