import pytest

pytest.importorskip("seqio")

from llm_jax.base.errors import UserError
from llm_jax.data.sources import ignored_files, list_files, open_source, read_records, source_hashes

MODULE = "seqio:tests.data.readers.seqio_tasks"
PAIRS = [{"prompt": f"train {w}?", "completion": w} for w in ("one", "two", "três", "四")]


def values(path, **options):
    return [record.value for record in read_records(path, **options)]


def test_features_become_records():
    assert values(f"{MODULE}:lj_pairs") == PAIRS
    assert values(f"{MODULE}:lj_ids") == PAIRS  # by what `tokenize` keeps
    assert values(f"{MODULE}:lj_texts") == [{"text": pair["completion"]} for pair in PAIRS]
    assert values(f"{MODULE}:lj_pairs:validation")[0]["prompt"] == "validation one?"
    assert [r.where for r in read_records(f"{MODULE}:lj_pairs", start=2)][0] == f"{MODULE}:lj_pairs, train example 3"
    assert values(f"{MODULE}:lj_pairs", start=3) == PAIRS[3:]
    assert [reader.count() for reader in open_source(f"{MODULE}:lj_pairs")] == [4]
    assert list_files(f"{MODULE}:lj_pairs") == [] == ignored_files(f"{MODULE}:lj_pairs")


def test_mixtures_are_seqios_own_and_repeatable():
    import seqio

    from tests.data.readers import seqio_tasks  # noqa: F401

    first = values(f"{MODULE}:lj_mixture")
    assert first == values(f"{MODULE}:lj_mixture") and values(f"{MODULE}:lj_mixture", start=2) == first[2:]
    assert {len(record) for record in first} == {1, 2}
    dataset = seqio.get_mixture_or_task("lj_mixture").get_dataset(None, shuffle=False, seed=0, num_epochs=1)
    assert [e["targets"].decode() for e in dataset.as_numpy_iterator()] == [
        record.get("completion", record.get("text")) for record in first
    ]
    assert values(f"{MODULE}:lj_id_mixture") == PAIRS


def test_hashes_tell_task_split_and_module(monkeypatch):
    from llm_jax.data.readers import seqio as reader

    paths = [f"{MODULE}:{name}" for name in ("lj_pairs", "lj_pairs:validation", "lj_ids", "lj_mixture")]
    made = [str(source_hashes(path)) for path in paths]
    assert len(set(made)) == len(paths) and made == [str(source_hashes(path)) for path in paths]
    monkeypatch.setattr(reader, "_module_hash", lambda module: "another source")
    assert str(source_hashes(paths[0])) != made[0]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("seqio:tests.data.readers.seqio_tasks", "has to be seqio:MODULE:NAME"),
        ("seqio:no.such.module:x", "the module no.such.module does not import: ModuleNotFoundError: No module"),
        (f"{MODULE}:lj_pears", "no task or mixture 'lj_pears' once .*; the nearest is lj_pairs"),
        (f"{MODULE}:lj_pairs:test", "no split 'test'; there are train, validation"),
        (f"{MODULE}:lj_bare_ids", "train example 1: inputs is no text, and no inputs_pretokenized"),
        (f"{MODULE}:lj_broken", "train example 3: .*a word of the test is refused"),
        (f"{MODULE}:lj_misspelt", "lj_misspelt: KeyError: .*imputs"),
    ],
)
def test_bad_names_and_tasks(path, message):
    with pytest.raises(UserError, match=message) as error:
        list(read_records(path))
    assert "\n" not in str(error.value)


def test_a_module_that_fails_when_imported(tmp_path, monkeypatch):
    (tmp_path / "lj_failing.py").write_text("raise RuntimeError('first\\nsecond')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"module lj_failing does not import: RuntimeError: first$"):
        open_source("seqio:lj_failing:x")
