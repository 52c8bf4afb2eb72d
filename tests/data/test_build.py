"""Sets of several shards: the same however often the build is interrupted, shared, in bounded memory."""

import functools
import hashlib
import json
import os
import pathlib
import random
import subprocess
import sys
import time
from typing import Literal

import numpy as np
import pytest

from llm_jax.data import build
from llm_jax.data.config import DataConfig
from llm_jax.data.prepare import prepare
from llm_jax.data.rowset import RowSet

PROCESS = pathlib.Path(__file__).parent / "build_process.py"
PACKINGS: tuple[Literal["best_fit", "concat_split", "one_per_row"], ...] = ("best_fit", "concat_split", "one_per_row")


def write_documents(path, count, seed=0):
    """JSONL documents of 3 to 120 random words; every tenth one a copy of the one before it."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(1, 8))) for _ in range(500)]
    documents: list[str] = []
    for number in range(count):
        text = " ".join(rng.choices(words, k=rng.randint(3, 120)))
        documents.append(documents[-1] if number % 10 == 9 else text)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return documents


@pytest.fixture(scope="module")
def made(bpe, tmp_path_factory):
    """A file of documents, the documents, and a tokenizer's folder."""
    folder = tmp_path_factory.mktemp("documents")
    documents = write_documents(folder / "documents.jsonl", 1500)
    bpe.save(folder / "tokenizer")
    return folder / "documents.jsonl", documents, folder / "tokenizer"


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(build, "CHUNK_ITEMS", 400)


def start(made, folder, store, packing="best_fit", seconds=0.0):
    file, _, tokenizer = made
    command = [sys.executable, str(PROCESS), *map(str, (file, tokenizer, folder, store, packing, seconds))]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def contents(store):
    """SHA-256 of every file of the sets in a store, by its place."""
    files = [f for f in store.rglob("*") if f.is_file() and f.name != "lock"]
    return {str(f.relative_to(store)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def shards(store):
    return len(list(store.glob("*/*/rows-*")))


def wait_for(condition, process):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("packing", PACKINGS)
def test_every_token_is_in_some_row(made, bpe, tmp_path, small_chunks, packing):
    file, documents, _ = made
    data = DataConfig(path=str(file), window=64, eval_fraction=0.1, packing=packing)
    prepared = prepare("pretrain", data, bpe, tmp_path)
    assert len(prepared.train.manifest["shards"]) > 2
    found = []
    for rows in (prepared.train, prepared.eval):
        columns = rows.columns()
        used = columns["segment_ids"] > 0
        found.append(columns["tokens"][used])
        # Segments are numbered from 1, positions count from 0 in each, and the first token of none is a target.
        first = used & (columns["positions"] == 0)
        assert (np.cumsum(first, 1)[used] == columns["segment_ids"][used]).all()
        assert not columns["loss_mask"][first].any() and columns["loss_mask"][used & ~first].all()
        assert not columns["loss_mask"][~used].any()
        if packing == "one_per_row":
            assert columns["segment_ids"].max() == 1
        if packing == "concat_split":
            assert (~used.all(1)).sum() <= 1  # all rows but the last are full
    wanted = [token for text in documents for token in [1, *bpe.encode(text), 1]]
    np.testing.assert_array_equal(np.sort(np.concatenate(found)), np.sort(wanted))
    for side in (prepared.summary["train"], prepared.summary["eval"]):
        assert side["tokens_read"] == side["tokens"]
    assert prepared.summary["train"]["documents"] + prepared.summary["eval"]["documents"] == len(documents)


def test_concatenated_rows_are_the_documents_in_order(made, bpe, tmp_path, small_chunks):
    file, documents, _ = made
    data = DataConfig(path=str(file), window=64, eval_path=str(file), packing="concat_split")
    rows = prepare("pretrain", data, bpe, tmp_path).eval
    stream = [token for text in documents for token in [1, *bpe.encode(text), 1]]
    wanted = {tuple(stream[start : start + 64]) for start in range(0, len(stream), 64)}
    columns = rows.columns()
    found = [row[used].tolist() for row, used in zip(columns["tokens"], columns["segment_ids"] > 0, strict=True)]
    assert {tuple(row) for row in found} == wanted and sum(map(len, found)) == len(stream)


def test_any_run_of_rows_is_a_sample_of_all_shards(made, bpe, tmp_path, small_chunks):
    file, *_ = made
    rows = prepare("pretrain", DataConfig(path=str(file), window=64), bpe, tmp_path).train
    firsts = np.cumsum(rows.manifest["shards"])
    stored = np.array([rows._stored[i] for i in range(len(rows))])
    assert sorted(stored) == list(range(len(rows)))
    early = np.bincount(np.searchsorted(firsts, stored[: len(rows) // 4], "right"), minlength=len(firsts))
    # The last shard is small.
    np.testing.assert_allclose(early[:-1] / np.array(rows.manifest["shards"][:-1]), 0.25, atol=0.15)
    tokens = rows.columns("tokens")["tokens"]
    np.testing.assert_array_equal(tokens[[5, 1, 9]], rows.read([5, 1, 9])["tokens"])


def test_rows_of_one_shard_are_those_of_a_build_in_memory(made, bpe, tmp_path):
    """The rows of data smaller than a chunk: best-fit over all, then one permutation by seed 0."""
    file, *_ = made
    rows = prepare("pretrain", DataConfig(path=str(file), window=64), bpe, tmp_path).train
    assert rows.manifest["shards"] == [len(rows)] and list(rows._stored) == list(range(len(rows)))


@pytest.mark.parametrize("packing", PACKINGS)
def test_an_interrupted_build_goes_on_to_the_same_bytes(made, bpe, tmp_path, small_chunks, monkeypatch, packing):
    file, *_ = made
    data = DataConfig(path=str(file), window=64, eval_fraction=0.1, packing=packing)
    prepare("pretrain", data, bpe, tmp_path / "run", tmp_path / "straight")
    write_shard, write_atomically = build.write_shard, build.write_atomically
    calls = 0

    def interrupted(write):
        def call(*args):
            nonlocal calls
            calls += 1
            written = write(*args)
            if calls % 3 == 0:  # after a shard that no progress speaks of yet, or after the progress
                raise KeyboardInterrupt
            return written

        return call

    monkeypatch.setattr(build, "write_shard", interrupted(write_shard))
    monkeypatch.setattr(build, "write_atomically", interrupted(write_atomically))
    interruptions = 0
    while True:
        try:
            prepare("pretrain", data, bpe, tmp_path / "run", tmp_path / "interrupted")
            break
        except KeyboardInterrupt:
            interruptions += 1
    assert interruptions > 3
    assert contents(tmp_path / "interrupted") == contents(tmp_path / "straight")


def test_a_build_that_is_killed_goes_on_to_the_same_bytes(made, bpe, tmp_path, small_chunks):
    file, *_ = made
    prepare("pretrain", DataConfig(path=str(file), window=64, eval_fraction=0.1), bpe, tmp_path, tmp_path / "straight")
    store = tmp_path / "killed"
    for kills in range(3):
        wanted = shards(store) + 1
        process = start(made, tmp_path / "run", store, seconds=0.05)
        wait_for(functools.partial(lambda wanted: shards(store) >= wanted, wanted), process)
        time.sleep(0.03 * kills)
        process.kill()
        process.communicate()
    last = start(made, tmp_path / "run", store)
    out, error = last.communicate(timeout=120)
    assert out == "prepared\n", error
    assert contents(store) == contents(tmp_path / "straight")


def test_two_builders_share_the_work_and_the_second_takes_over(made, bpe, tmp_path, small_chunks):
    file, *_ = made
    prepare("pretrain", DataConfig(path=str(file), window=64, eval_fraction=0.1), bpe, tmp_path, tmp_path / "straight")
    store = tmp_path / "store"
    first = start(made, tmp_path / "a", store, seconds=3)
    wait_for(lambda: shards(store) > 0, first)
    others = [start(made, tmp_path / run, store) for run in "bc"]
    for process in others:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert line.startswith(f"waiting for process {first.pid} on "), line
    made_by_first = shards(store)
    first.kill()
    first.communicate()
    outputs = [process.communicate(timeout=120) for process in others]
    assert [out for out, _ in outputs] == ["prepared\n"] * 2, outputs
    said = "".join(error for _, error in outputs)
    assert said.count(f"left unfinished by process {first.pid}") == 1 and " is made" in said
    assert made_by_first > 0 and len(list(store.iterdir())) == 1
    assert contents(store) == contents(tmp_path / "straight")
    manifests = [json.loads((tmp_path / run / "manifest.json").read_text()) for run in "bc"]
    assert manifests[0] == manifests[1] and manifests[0]["sets"]["records"].startswith("../store/")


def test_what_a_set_is_made_from_decides_where_it_lies(made, bpe, tmp_path):
    file, *_ = made
    sets = [
        prepare("pretrain", DataConfig(path=str(file), window=64, packing=packing), bpe, tmp_path / name, tmp_path)
        for name, packing in zip("abc", (PACKINGS[0], PACKINGS[0], PACKINGS[1]))
    ]
    folders = [str(prepared.train.folder.resolve()) for prepared in sets]
    assert folders[0] == folders[1] != folders[2]
    # A set that was removed is made again.
    folder = pathlib.Path(folders[0]).parent
    (folder / "manifest.json").unlink()
    again = prepare("pretrain", DataConfig(path=str(file), window=64), bpe, tmp_path / "a", tmp_path)
    assert again.summary == sets[0].summary and len(RowSet(folder / "train")) == len(sets[0].train)


@pytest.mark.slow
def test_memory_is_bounded(bpe, tmp_path):
    """A text of 100 MB in less than 600 MB, jax, the sample for a BPE and its training included."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 9))) for _ in range(20_000)]
    with open(tmp_path / "text.txt", "w") as f:
        for _ in range(100_000_000 // 600):
            f.write(" ".join(rng.choices(words, k=92)) + "\n\n")
    script = f"""
import jax; jax.devices()
from llm_jax.data.bpe_text import pretrain_texts
from llm_jax.data.config import DataConfig
from llm_jax.data.prepare import prepare
from llm_jax.data.tokenizer_training import train_bpe
data = DataConfig(path={str(tmp_path / "text.txt")!r})
prepare("pretrain", data, train_bpe(pretrain_texts(data), 2048), {str(tmp_path / "rows")!r})
# Not getrusage's: that counts what this process was before it became Python, the test's.
print([line for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
"""
    # As a user's command: with one device, where tests have eight.
    alone = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run([sys.executable, "-c", script], env=alone, stdout=subprocess.PIPE, text=True, check=True)
    peak = int(done.stdout.split("VmHWM:")[1].split()[0])
    assert peak < 600_000, peak
