import dataclasses
import json
import os

import numpy as np
import pytest

from llm_jax.base.errors import UserError
from llm_jax.data.bpe_text import pretrain_texts
from llm_jax.data.checking import check_lengths, check_records
from llm_jax.data.config import DataConfig, EmbeddedConfig
from llm_jax.data.corpus import held_out_problems, source_manifest
from llm_jax.data.embedded.problems import is_careful, is_correct
from llm_jax.data.prepare import prepare

TINY = EmbeddedConfig(records=120, eval_records=24, max_number=12)
EMBEDDED = DataConfig(generated=TINY, window=256)
KINDS = ("pretrain", "sft", "preference")


@pytest.fixture(scope="module")
def embedded(bpe, tmp_path_factory):
    return {kind: prepare(kind, EMBEDDED, bpe, tmp_path_factory.mktemp(kind) / "data") for kind in KINDS}


def segments(rowset):
    """(ids, mask, row, segment) of every segment."""
    for index in range(len(rowset)):
        row = rowset[index]
        for number in range(1, row["segment_ids"].max() + 1):
            here = row["segment_ids"] == number
            yield row["tokens"][here], row["loss_mask"][here], row, here


@pytest.mark.parametrize("kind", KINDS)
def test_token_accounting_adds_up(embedded, kind):
    prepared = embedded[kind]
    for split in ("train", "eval"):
        counts, rowset = prepared.summary[split], getattr(prepared, split)
        columns = rowset.columns()
        assert counts["rows"] == len(rowset) == len(columns["tokens"])
        assert counts["tokens"] == (columns["segment_ids"] > 0).sum()
        assert counts["tokens_read"] == counts["tokens"] + counts["tokens_truncated"] + counts["tokens_dropped"]
        assert counts["targets"] == columns["loss_mask"].sum()
        assert counts["target_bytes"] == columns["num_bytes"].sum()
        used = columns["tokens"][columns["loss_mask"] == 1]
        assert counts["target_bytes"] == prepared.tokenizer.token_bytes[used].sum()
        assert counts["padding_share"] == pytest.approx(1 - counts["tokens"] / columns["tokens"].size, abs=1e-6)
        for field in ("documents", "rows", "tokens", "targets", "target_bytes"):
            assert counts[field] == sum(source[field] for source in counts["sources"].values())
        for name, source in counts["sources"].items():
            assert source["rows"] == len(rowset.where(name))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_keep_the_contract(embedded, kind):
    for ids, mask, row, here in segments(embedded[kind].train):
        assert row["positions"][here].tolist() == list(range(len(ids)))
        assert mask[0] == 0 and (np.diff(np.flatnonzero(here)) == 1).all()
        padding = row["segment_ids"] == 0
        assert not row["loss_mask"][padding].any() and (row["tokens"][padding] == 0).all()


def test_pretraining_holds_every_token_once(embedded, bpe, tmp_path):
    path = tmp_path / "docs.jsonl"
    documents = [f"Document {i}. " + "word " * (i * 7 % 60) for i in range(50)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    prepared = prepare("pretrain", DataConfig(path=str(path), eval_fraction=0.2, window=16), bpe, tmp_path / "data")
    wanted = sorted(token for text in documents for token in [1, *bpe.encode(text), 1])
    found = [ids for split in (prepared.train, prepared.eval) for ids, *_ in segments(split)]
    assert sorted(np.concatenate(found).tolist()) == wanted
    # Consecutive pieces put together again are the documents.
    long = max(documents, key=len)
    ids = [1, *bpe.encode(long), 1]
    pieces = {tuple(piece) for piece in map(np.ndarray.tolist, found)}
    assert all(tuple(ids[start : start + 16]) in pieces for start in range(0, len(ids), 16))


def test_text_and_stories_are_mixed(embedded):
    sources = embedded["pretrain"].summary["train"]["sources"]
    assert sources["text"]["tokens"] >= sources["problems"]["tokens"]  # whole documents until half is reached
    assert set(embedded["pretrain"].train.columns("source_id")["source_id"].tolist()) == {0, 1}


def test_sft_targets_are_the_answers(embedded):
    prepared = embedded["sft"]
    decode = prepared.tokenizer.decode
    answers = [decode(ids[mask == 1]) for ids, mask, *_ in segments(prepared.train)]
    assert len(answers) == 120
    assert all(answer.endswith("<|im_end|>") and answer.count("Answer:") == 1 for answer in answers)
    careful = [is_careful(answer) for answer in answers]
    assert 0.3 < np.mean(careful) < 0.6
    assert all(answer.startswith("It ") for answer, c in zip(answers, careful, strict=True) if not c)


def test_pairs_are_whole_and_numbered(embedded):
    prepared = embedded["preference"]
    numbers = prepared.train.columns("pair_index")["pair_index"]
    assert sorted(numbers[numbers >= 0].tolist()) == list(range(120))
    decode = prepared.tokenizer.decode
    for index in range(len(prepared.train)):
        row = prepared.train[index]
        for pair in range(1, row["pair_id"].max() + 1):
            sides = [(row["pair_id"] == pair) & (row["side"] == side) for side in (1, 2)]
            prompts, answers = zip(
                *[
                    (row["tokens"][s & (row["loss_mask"] == 0)], row["tokens"][s & (row["loss_mask"] == 1)])
                    for s in sides
                ]
            )
            assert prompts[0].tolist() == prompts[1].tolist()
            assert is_careful(decode(answers[0])) and not is_careful(decode(answers[1]))
            assert row["pair_index"][pair - 1] >= 0


def test_a_finished_folder_is_reused_and_another_refused(bpe, tmp_path):
    first = prepare("sft", EMBEDDED, bpe, tmp_path)
    (shard,) = tmp_path.glob("*/train/rows-00000.array_record")
    stamp = shard.stat().st_mtime_ns
    again = prepare("sft", EMBEDDED, bpe, tmp_path)
    assert again.summary == first.summary
    assert shard.stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match="made with another window"):
        prepare("sft", dataclasses.replace(EMBEDDED, window=240), bpe, tmp_path)
    with pytest.raises(UserError, match="made with another tokenizer"):
        prepare("sft", EMBEDDED, bpe.with_chat_template("{{ messages[0].content }}"), tmp_path)
    (tmp_path / "manifest.json").unlink()  # unfinished: made anew
    assert prepare("sft", EMBEDDED, bpe, tmp_path).summary == first.summary


def test_the_same_inputs_give_the_same_bytes(embedded, bpe, tmp_path):
    for kind in KINDS:
        again = prepare(kind, EMBEDDED, bpe, tmp_path / kind)
        for name, column in again.train.columns().items():
            np.testing.assert_array_equal(column, embedded[kind].train.columns()[name])


def chat(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def test_long_sft_records(bpe, tmp_path, write_jsonl):
    short = [chat(f"q{i}", "a") for i in range(30)]
    path = write_jsonl(*short, chat("q", "long answer " * 40))
    data = DataConfig(path=path, window=64, eval_fraction=0.1)
    with pytest.raises(
        UserError, match=r"data.jsonl:31: record of \d+ tokens \(prompt 17\) is longer than the window of"
    ):
        prepare("sft", data, bpe, tmp_path / "error")
    assert not (tmp_path / "error" / "manifest.json").exists()
    counts = {}
    for on_long in ("truncate", "drop"):
        prepared = prepare("sft", dataclasses.replace(data, on_long=on_long), bpe, tmp_path / on_long)
        sides = [prepared.summary[split] for split in ("train", "eval")]
        counts[on_long] = {f: sum(side[f] for side in sides) for f in ("documents", "truncated", "dropped", "tokens")}
    assert counts["truncate"] == {
        "documents": 31,
        "truncated": 1,
        "dropped": 0,
        "tokens": counts["drop"]["tokens"] + 64,
    }
    assert counts["drop"]["dropped"] == 1 and counts["drop"]["truncated"] == 0


def test_a_prompt_longer_than_the_window(bpe, tmp_path, write_jsonl):
    path = write_jsonl(*[chat(f"q{i}", "a") for i in range(30)], chat("long question " * 40, "a"))
    data = DataConfig(path=path, window=64, eval_fraction=0.1)
    message = "data.jsonl:31: the prompt leaves no room for an answer in a window of 64"
    for on_long in ("error", "truncate"):
        long = dataclasses.replace(data, on_long=on_long)
        with pytest.raises(UserError, match=message):
            check_lengths("sft", long, bpe)
        with pytest.raises(UserError, match=message):
            prepare("sft", long, bpe, tmp_path / on_long)
    check_lengths("sft", dataclasses.replace(data, on_long="drop"), bpe)


def test_long_pairs_are_cut_to_share_a_window(bpe, tmp_path, write_jsonl):
    pairs = [{"prompt": "q", "chosen": f"{i}", "rejected": "b"} for i in range(20)]
    path = write_jsonl(*pairs, {"prompt": "q", "chosen": "x y " * 40, "rejected": "no"})
    data = DataConfig(path=path, window=32, eval_fraction=0.1)
    with pytest.raises(UserError, match=r"data.jsonl:21: pair of \d+ \+ \d+ tokens"):
        prepare("preference", data, bpe, tmp_path / "error")
    prepared = prepare("preference", dataclasses.replace(data, on_long="truncate"), bpe, tmp_path / "cut")
    rows = prepared.train.columns()
    full = (rows["segment_ids"] > 0).sum(1) == 32
    assert full.any() and sum(prepared.summary[s]["truncated"] for s in ("train", "eval")) == 1


def test_equal_answers_are_left_out(bpe, tmp_path, write_jsonl):
    pairs = [{"prompt": "q", "chosen": f"{i}", "rejected": "b"} for i in range(20)]
    path = write_jsonl(*pairs, {"prompt": "q", "chosen": "b", "rejected": "b"})
    prepared = prepare("preference", DataConfig(path=path, eval_fraction=0.1), bpe, tmp_path / "data")
    assert sum(prepared.summary[s]["identical"] for s in ("train", "eval")) == 1
    assert sum(prepared.summary[s]["documents"] for s in ("train", "eval")) == 21


def test_held_out_records(write_jsonl, bpe, tmp_path):
    records = [{"text": f"document {i % 90}"} for i in range(100)]  # ten of them twice
    path = write_jsonl(*records)
    prepared = prepare("pretrain", DataConfig(path=path, eval_fraction=0.2), bpe, tmp_path / "a")
    texts = {
        split: {bpe.decode(ids, skip_special_tokens=True) for ids, *_ in segments(getattr(prepared, split))}
        for split in ("train", "eval")
    }
    assert not texts["train"] & texts["eval"] and len(texts["train"] | texts["eval"]) == 90
    assert 8 <= len(texts["eval"]) <= 30
    assert set(pretrain_texts(DataConfig(path=path, eval_fraction=0.2))) == texts["train"]
    few = write_jsonl({"text": "one"}, {"text": "two"}, name="few.jsonl")
    assert len(prepare("pretrain", DataConfig(path=few), bpe, tmp_path / "b").eval) == 1
    other = prepare("pretrain", DataConfig(path=path, eval_path=few), bpe, tmp_path / "c")
    assert other.summary["eval"]["documents"] == 2 and other.summary["train"]["documents"] == 100


def test_a_kill_before_any_file_is_finished_is_made_good(write_jsonl, bpe, tmp_path, monkeypatch):
    data = DataConfig(path=write_jsonl(*({"text": f"story {i}"} for i in range(40))), eval_fraction=0.25, window=32)
    replace, left = os.replace, 0

    def killed(source, target):
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    for finished in range(6):  # progress and rows of both sides, the set, and the run's manifest: one more each time
        left = min(finished, 1)
        with pytest.raises(KeyboardInterrupt):
            prepare("pretrain", data, bpe, tmp_path / "data")
        assert not (tmp_path / "data" / "manifest.json").exists()
    left = 1
    made = prepare("pretrain", data, bpe, tmp_path / "data")
    assert prepare("pretrain", data, bpe, tmp_path / "data").summary == made.summary


def test_source_manifest_is_of_contents(write_jsonl, tmp_path):
    path = write_jsonl({"text": "one"}, {"text": "two"})
    manifest = source_manifest("pretrain", DataConfig(path=path))
    assert manifest == json.loads(json.dumps(manifest)) and str(tmp_path) not in json.dumps(manifest)
    (tmp_path / "moved").mkdir()
    moved = write_jsonl({"text": "one"}, {"text": "two"}, name="moved/data.jsonl")
    assert source_manifest("pretrain", DataConfig(path=moved)) == manifest
    write_jsonl({"text": "one"}, {"text": "other"})
    assert source_manifest("pretrain", DataConfig(path=path)) != manifest
    made = [source_manifest(kind, EMBEDDED) for kind in KINDS]
    assert len({json.dumps(m) for m in made}) == 3


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("sft", {"window": 1}, "data.window is 1"),
        ("sft", {"eval_path": "x"}, "data.eval_path is set without data.path"),
        ("sft", {"path": "nonesuch.jsonl"}, "nonesuch.jsonl does not exist"),
        ("sft", {"max_records": 0}, "data.max_records is 0"),
        ("sft", {"chat_template": "nonesuch"}, "neither a built-in template"),
        ("pretrain", {"generated": EmbeddedConfig(max_number=1)}, "max_number is 1"),
        (
            "pretrain",
            {"generated": EmbeddedConfig(min_operations=3, max_operations=2)},
            "min_operations..max_operations",
        ),
        ("sft", {"generated": EmbeddedConfig(careful_fraction=1.5)}, "careful_fraction is 1.5"),
        ("pretrain", {"generated": EmbeddedConfig(records=0)}, "records is 0"),
    ],
)
def test_bad_settings(kind, changes, message):
    with pytest.raises(UserError, match=message):
        check_records(kind, DataConfig(**changes))


def test_bad_records_are_found_before_anything_is_made(write_jsonl, tmp_path):
    good = [chat(f"q{i}", "a") for i in range(5)]
    path = write_jsonl(*good, {"question": "q"})
    with pytest.raises(UserError, match="data.jsonl:6: sft needs"):
        check_records("sft", DataConfig(path=path))
    with pytest.raises(UserError, match="data.eval_fraction is 0"):
        check_records("sft", DataConfig(path=path, eval_fraction=0.0))
    template = tmp_path / "silent.jinja"
    template.write_text("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}")
    with pytest.raises(UserError, match="data.jsonl:1: chat template: .*all-zero"):
        check_records("sft", DataConfig(path=write_jsonl(*good), chat_template=str(template)))
    with pytest.raises(UserError, match="all-zero"):
        check_records("preference", DataConfig(chat_template=str(template)))
    single = write_jsonl({"text": "one"}, name="single.jsonl")
    with pytest.raises(UserError, match="holds one record"):
        check_records("pretrain", DataConfig(path=single))
    check_records("sft", DataConfig(path=write_jsonl(*good), chat_template="chatml"))


def test_held_out_problems():
    found = held_out_problems(DataConfig(), 400)
    assert len(found) == 400 and {len(problem.steps) for problem in found} == {1, 2, 3}
    assert all(is_correct(problem, problem.careful) for problem in found)
    assert found[:10] == held_out_problems(DataConfig(), 10)


def test_kinds_of_docstring_pairs_are_sources(chat_bpe, tmp_path):
    """So that each has its own accuracy; of two held-out pairs one kind at least has none."""
    data = DataConfig(embedded="docstrings", window=512, generated=EmbeddedConfig(records=60, eval_records=2))
    made = prepare("preference", data, chat_bpe, tmp_path / "rows")
    assert made.train.manifest["sources"] == made.eval.manifest["sources"] == ["other", "cut", "shuffled"]
    totals = made.train.manifest["totals"]
    assert sum(total["documents"] for total in totals.values()) == 60
    assert totals["other"]["documents"] > totals["cut"]["documents"] + totals["shuffled"]["documents"]
    columns = made.train.columns("source_id", "pair_index")
    for number, name in enumerate(totals):
        own = columns["pair_index"][columns["source_id"] == number]
        assert (own >= 0).sum() == totals[name]["documents"]
    held_out = [total["documents"] for total in made.eval.manifest["totals"].values()]
    assert sum(held_out) == 2 and 0 in held_out
