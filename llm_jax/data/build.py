"""Packs one side of a set in bounded memory, shard by shard: killed at any moment it goes on, to the same bytes.

Examples are gathered until they fill a buffer (`CHUNK_ITEMS`, `CHUNK_TOKENS`), packed among themselves, shuffled, and
written as a shard. `progress.json` then says how many shards there are and which record comes next. How a buffer is
packed depends on nothing but its examples and its number.
"""

import dataclasses
import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from etils import epath

from llm_jax.base.errors import UserError
from llm_jax.base.progress import Progress
from llm_jax.data.config import DataConfig
from llm_jax.data.corpus import Reader
from llm_jax.data.encode import Encoded, Sequence, encode_examples
from llm_jax.data.examples import JUDGED, PAIRED, UNPAIRED, Kind
from llm_jax.data.fitting import Counts, Item, fit, split, whole
from llm_jax.data.mismatching import mismatched
from llm_jax.data.packing import best_fit_decreasing, cut_every
from llm_jax.data.rows import (
    Row,
    Schema,
    fill_labelled_row,
    fill_pair_row,
    fill_ranking_row,
    fill_row,
    fill_steps_row,
    fill_unpaired_row,
    labelled_schema,
    lm_schema,
    pair_schema,
    ranking_schema,
    steps_schema,
    unpaired_schema,
)
from llm_jax.data.rowset import MANIFEST, RowSet, write_manifest, write_shard
from llm_jax.data.tokenizers import Tokenizer
from llm_jax.storage.atomic import write_atomically

PROGRESS = "progress.json"
# Many enough for best-fit to fill windows, few enough to be held: some 150 MB.
CHUNK_ITEMS, CHUNK_TOKENS = 1 << 17, 1 << 24


@dataclasses.dataclass
class Totals:
    """What was read of one source, and what its rows hold."""

    counts: Counts = dataclasses.field(default_factory=Counts)
    rows: int = 0
    tokens: int = 0
    targets: int = 0
    target_bytes: int = 0

    def add(self, row: Row) -> None:
        self.rows += 1
        self.tokens += int((row["segment_ids"] > 0).sum())
        self.targets += int(row["loss_mask"].sum())
        self.target_bytes += int(row["num_bytes"])

    def flat(self) -> dict[str, int]:
        numbers = dataclasses.asdict(self)
        return {**numbers.pop("counts"), **numbers}


Budget = Callable[[str, Mapping[str, Totals]], float]
"""How many tokens to read of a source, whole documents, given what was read of all so far."""


@dataclasses.dataclass
class _State:
    """What is committed, and where to go on."""

    totals: dict[str, Totals]
    shards: list[int] = dataclasses.field(default_factory=list)
    source: int = 0
    record: int = 0
    pairs: int = 0  # how many pairs or unpaired answers are in the shards
    most_pairs: int | None = None  # in a row, as the first shard has it
    most_answers: int | None = None  # in a ranking, likewise
    carried: list[list[list[int]]] = dataclasses.field(default_factory=list)
    """Ids and masks that did not fill a row, for `concat_split`."""

    @classmethod
    def load(cls, file: epath.Path, names: list[str]) -> "_State":
        if not file.exists():
            return cls({name: Totals() for name in names})
        stored = json.loads(file.read_text())
        totals = {n: Totals(Counts(**t.pop("counts")), **t) for n, t in stored.pop("totals").items()}
        return cls(totals, **stored)

    def save(self, file: epath.Path) -> None:
        write_atomically(file, json.dumps(dataclasses.asdict(self)))


def build_side(
    folder: epath.Path,
    kind: Kind,
    data: DataConfig,
    tokenizer: Tokenizer,
    sources: Mapping[str, Reader],
    budget: Budget | None = None,
    records: int | None = None,
) -> RowSet:
    """Writes the rows of one side, or what is missing of them.

    Args:
      folder: holds nothing but what an earlier call with the same arguments left.
      kind: what records are.
      data: window, packing, on_long.
      tokenizer: as for `encode_examples`.
      sources: readers by name, in the order they are read.
      budget: of tokens; None reads all.
      records: how many there are, about, for the time left.

    Raises:
      UserError: a record cannot be used.
    """
    if (folder / MANIFEST).exists():
        return RowSet(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = _State.load(folder / PROGRESS, list(sources))
    with Progress(f"packing {folder.name}", "tokens") as progress:

        def show() -> None:
            tokens = sum(total.counts.tokens_read for total in state.totals.values())
            progress.update(records, state.record, records=state.record, tokens=tokens)

        for items in _chunks(state, kind, data, tokenizer, sources, budget, show):
            placed = _pack(state, kind, data, items, list(sources))
            if placed:
                schema = _schema(state, kind, data)
                rows = _rows(state, placed, schema, data, tokenizer, list(sources))
                state.shards.append(write_shard(folder, len(state.shards), rows, schema))
            state.save(folder / PROGRESS)
    manifest = {
        "kind": kind,
        "window": data.window,
        "vocab_size": tokenizer.vocab_size,
        "pad_id": tokenizer.pad_id,
        "sources": list(sources),
        "records": state.record,
        "totals": {name: total.flat() for name, total in state.totals.items()},
    }
    write_manifest(folder, state.shards, _schema(state, kind, data), manifest)
    (folder / PROGRESS).unlink()
    return RowSet(folder)


def _schema(state: _State, kind: Kind, data: DataConfig) -> Schema:
    if kind in PAIRED:
        return pair_schema(data.window, state.most_pairs or 1, data.share_prompts)
    if kind == "labelled":
        return labelled_schema(data.window, state.most_pairs or 1)
    if kind == "ranking":
        return ranking_schema(data.window, state.most_pairs or 1, (state.most_pairs or 1) * (state.most_answers or 2))
    if kind == "steps":
        return steps_schema(data.window)
    if kind in UNPAIRED:
        return unpaired_schema(data.window, state.most_pairs or 1, kind == "unpaired_mismatched")
    return lm_schema(data.window)


def _chunks(
    state: _State,
    kind: Kind,
    data: DataConfig,
    tokenizer: Tokenizer,
    sources: Mapping[str, Reader],
    budget: Budget | None,
    show: Callable[[], None],
) -> Iterator[dict[str, list[Item]]]:
    """Items by source, a buffer at a time; `state` then says which record comes after them."""
    names = list(sources)
    if state.source == len(names):
        return
    items: dict[str, list[Item]] = {}
    held = tokens = 0
    while state.source < len(names):
        name = names[state.source]
        counts = state.totals[name].counts
        limit = budget(name, state.totals) if budget else float("inf")
        # One that was stopped by its budget has been read to the end.
        examples = _encoded(kind, sources[name], state.record, tokenizer) if counts.tokens_read < limit else ()
        for record, example in examples:
            if record != state.record and (held >= CHUNK_ITEMS or tokens >= CHUNK_TOKENS):
                state.record = record
                yield items
                items, held, tokens = {}, 0, 0
            state.record = record
            for item in _items(kind, data, example, counts):
                items.setdefault(name, []).append(item)
                held += 1
                tokens += item.tokens
            show()
            if counts.tokens_read >= limit:
                break
        state.source, last = state.source + 1, state.record
        state.record = 0 if state.source < len(names) else last + 1
        # What of the source did not fill a row is a row of its own, before the next source's.
        items.setdefault(name, [])
    yield items


def _encoded(kind: Kind, read: Reader, start: int, tokenizer: Tokenizer) -> Iterator[tuple[int, Encoded]]:
    """Encoded examples with the numbers of their records."""
    numbers: deque[int] = deque()

    def examples():
        for number, where, example in read(start):
            numbers.append(number)
            yield where, example

    for encoded in encode_examples(kind, examples(), tokenizer):
        yield numbers.popleft(), encoded


def _items(kind: Kind, data: DataConfig, example: Encoded, counts: Counts) -> Iterator[Item]:
    if data.packing == "concat_split":
        return whole([example], counts)
    if kind == "pretrain":
        return split([example], data.window, counts)
    return fit([example], data.window, data.on_long, counts, data.on_unusable, data.share_prompts)


def _pack(
    state: _State, kind: Kind, data: DataConfig, items: dict[str, list[Item]], names: list[str]
) -> list[tuple[str, list[tuple[int, Item]]]]:
    """Every row's source and numbered items."""
    placed = []
    for name, own in items.items():
        if data.packing == "concat_split":
            line = [_restored(one) for one in state.carried] + [item.sequences[0] for item in own]
            windows = [
                [(0, Item((Sequence(line[i].ids[a:b], line[i].mask[a:b]),))) for i, a, b in pieces]
                for pieces in cut_every([len(sequence.ids) for sequence in line], data.window)
            ]
            state.carried = []
            ended = names.index(name) < state.source
            if windows and not ended and sum(len(item.sequences[0].ids) for _, item in windows[-1]) < data.window:
                last = [item.sequences[0] for _, item in windows.pop()]
                state.carried = [[s.ids.tolist(), s.mask.tolist()] for s in last]
        else:
            if kind == "unpaired_mismatched":
                own = mismatched(own, data.window)
            # The mismatched answers lie in a window of their own, beside the others.
            lengths = [max(len(s.ids) for s in item.sequences) if kind in UNPAIRED else item.tokens for item in own]
            numbers = _windows(state, data, lengths)
            windows = [[(state.pairs + i, own[i]) for i in window] for window in numbers]
            if kind in JUDGED:
                state.pairs += len(own)
            if kind == "ranking" and own:
                most = max(len(item.sequences) for item in own)
                state.most_answers = state.most_answers or most
                if most > state.most_answers:
                    raise UserError(
                        f"a ranking of {most} answers comes after {CHUNK_ITEMS} records or more of at most"
                        f" {state.most_answers}: put the longest rankings first"
                    )
            if kind in JUDGED and kind != "steps":
                state.most_pairs = state.most_pairs or max(map(len, windows), default=None)
        placed += [(name, window) for window in windows]
    return placed


def _windows(state: _State, data: DataConfig, lengths: list[int]) -> list[list[int]]:
    if data.packing == "one_per_row":
        return [[number] for number in range(len(lengths))]
    return best_fit_decreasing(lengths, data.window, state.most_pairs)


def _restored(stored: list[list[int]]) -> Sequence:
    return Sequence(np.array(stored[0], np.int32), np.array(stored[1], np.uint8))


def _rows(
    state: _State,
    placed: list[tuple[str, list[tuple[int, Item]]]],
    schema: Schema,
    data: DataConfig,
    tokenizer: Tokenizer,
    names: list[str],
) -> Iterator[Row]:
    """Every window as a row, in shuffled order."""
    rng = np.random.default_rng(len(state.shards))
    for index in rng.permutation(len(placed)).tolist():
        name, window = placed[index]
        number = names.index(name)
        if "pair_index" in schema:
            row = fill_pair_row(schema, window, tokenizer.token_bytes, tokenizer.pad_id, number)
        elif "ranking_index" in schema:
            rankings = [(ranking, item.sequences) for ranking, item in window]
            row = fill_ranking_row(schema, rankings, tokenizer.token_bytes, tokenizer.pad_id, number)
        elif "step_label" in schema:
            judged = [(item.sequences[0], item.columns) for _, item in window]
            row = fill_steps_row(schema, judged, tokenizer.token_bytes, tokenizer.pad_id, number)
        elif "answer_index" in schema and "weight" not in schema:
            texts = [(text, item.sequences[0], item.columns) for text, item in window]
            row = fill_labelled_row(schema, texts, tokenizer.token_bytes, tokenizer.pad_id, number)
        elif "answer_index" in schema:
            answers = [(answer, item.sequences, item.columns) for answer, item in window]
            row = fill_unpaired_row(schema, answers, tokenizer.token_bytes, tokenizer.pad_id, number)
        else:
            segments = [item.sequences[0] for _, item in window]
            if data.random_prefix:
                segments = [_after_prefix(segment, rng) for segment in segments]
            row = fill_row(schema, segments, tokenizer.token_bytes, tokenizer.pad_id, number)
        state.totals[name].add(row)
        yield row


def _after_prefix(segment: Sequence, rng: np.random.Generator) -> Sequence:
    """Targets from a random place on, all places alike ("prefix LM": Raffel et al. 2020, arXiv:1910.10683, 3.2)."""
    if len(segment.ids) < 2:
        return segment
    mask = segment.mask.copy()
    mask[: rng.integers(1, len(mask))] = 0
    return Sequence(segment.ids, mask)
