"""The pairs of a round, chunk by chunk: each chunk is made once and written at once, whole or not at all.

ROUND/journal/000003.jsonl   what was drawn for chunk 3, call by call (`sampler.Journal`)
ROUND/chunks/000003.json     what was made of it: pairs, counts, notes; it is there when the chunk is done
ROUND/pairs.jsonl            all pairs of the round; it is there when the set is whole
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from etils import epath

from llm_jax.base.progress import Progress
from llm_jax.jobs.alignment.prompts import Prompt
from llm_jax.jobs.alignment.sampler import Journal, Sampler
from llm_jax.storage.atomic import write_atomically


@dataclass(frozen=True)
class Made:
    """What came of a chunk of prompts; JSON values throughout."""

    records: list[dict[str, Any]]
    """Preference records (`prompts.preference_record`)."""
    counts: dict[str, float] = field(default_factory=dict)
    """Numbers that add up over chunks: `samples`, `truncated`, `skipped`, `score_sum`, ..."""
    notes: list[Any] = field(default_factory=list)
    """What else is kept, a search tree, say."""


class PairMaker(Protocol):
    """A method: prompts in, preference records out."""

    def __call__(self, chunk: Sequence[Prompt], sampler: Sampler, seed: int) -> Made:
        """A pure function of its arguments and of the sampler's weights.

        `seed` is the round's; each prompt's samples take `prompt_seed(seed, prompt.number)`, or equal prompts of a
        chunk would draw equal noise.
        """
        ...


def prompt_seed(seed: int, number: int, purpose: str = "") -> int:
    """A seed below 2**63 for the samples of one prompt (further ones by `purpose`)."""
    digest = hashlib.sha256(f"{seed}/{number}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class ChunkStore:
    """The chunks of one round by number."""

    def __init__(self, folder: epath.Path):
        self.folder = folder
        self.pairs = folder / "pairs.jsonl"

    def file(self, number: int) -> epath.Path:
        return self.folder / "chunks" / f"{number:06d}.json"

    def journal(self, number: int) -> epath.Path:
        return self.folder / "journal" / f"{number:06d}.jsonl"

    def read(self, number: int) -> Made | None:
        """What was made of a chunk; None where that has not been finished."""
        file = self.file(number)
        return Made(**json.loads(file.read_text())) if file.exists() else None

    def all(self) -> list[Made]:
        """What was made of every chunk that is finished, in order."""
        return [Made(**json.loads(file.read_text())) for file in sorted((self.folder / "chunks").glob("*.json"))]

    def write(self, number: int, made: Made) -> None:
        write_atomically(self.file(number), json.dumps(asdict(made), ensure_ascii=False))

    def obtain(self, number: int, make: Callable[[Sampler], Made], sampler: Callable[[], Sampler]) -> Made:
        """A chunk as it is, or made now with a sampler that is opened only then."""
        if (made := self.read(number)) is not None:
            return made
        for part in (self.file(number).parent, self.journal(number).parent):
            part.mkdir(parents=True, exist_ok=True)
        journal = Journal(sampler(), self.journal(number))
        made = make(journal)
        journal.close()
        self.write(number, made)
        return made


def make_pairs(
    store: ChunkStore,
    prompts: Sequence[Prompt],
    size: int,
    maker: PairMaker,
    sampler: Callable[[], Sampler],
    seed: int,
    earlier: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Makes what is missing of a round's pairs, and writes `pairs.jsonl`.

    Args:
      store: of the round.
      prompts: of the round.
      size: prompts of a chunk; what is drawn for one is lost at most in a kill.
      maker: the method.
      sampler: opens the policy of the round's start; not called where every chunk is there.
      seed: of the round.
      earlier: records of rounds before that are trained on again.
    """
    chunks = [prompts[first : first + size] for first in range(0, len(prompts), size)]
    records: list[Mapping[str, Any]] = [*earlier]
    with Progress("sampling", "prompts") as progress:
        for number, chunk in enumerate(chunks):
            made = store.obtain(number, lambda sampler, chunk=chunk: maker(chunk, sampler, seed), sampler)
            records += made.records
            progress.update(len(chunks), number + 1, prompts=min(len(prompts), (number + 1) * size))
    write_atomically(store.pairs, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def summed(chunks: Iterable[Made]) -> dict[str, float]:
    """The counts of chunks added up, and how many `pairs` they have."""
    counts: dict[str, float] = {"pairs": 0}
    for made in chunks:
        counts["pairs"] += len(made.records)
        for name, value in made.counts.items():
            counts[name] = counts.get(name, 0) + value
    return counts
