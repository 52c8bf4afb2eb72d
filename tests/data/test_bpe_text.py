import json

from llm_jax.data import bpe_text
from llm_jax.data.bpe_text import pretrain_texts, sample
from llm_jax.data.config import DataConfig, SourceConfig

TEXTS = [f"text {i} " + "x" * (i % 13) for i in range(1000)]


def test_little_text_is_taken_whole_and_in_order():
    assert sample(iter(TEXTS), 1e9) == TEXTS


def test_much_text_is_sampled_by_content():
    kept = sample(iter(TEXTS), 3000)
    size = sum(map(len, kept))
    assert 3000 - 30 < size <= 3000
    assert kept == [text for text in TEXTS if text in set(kept)]
    # Whatever the order they come in, it is the same texts; and they come from everywhere.
    assert set(sample(reversed(TEXTS), 3000)) == set(kept)
    places = [TEXTS.index(text) for text in kept]
    assert places[0] < 50 and places[-1] > 950 and 400 < sum(places) / len(places) < 600


def test_each_source_of_a_mixture_gives_its_share(tmp_path, monkeypatch):
    monkeypatch.setattr(bpe_text, "BPE_CHARACTERS", 4000)
    sources = []
    for name, weight in (("a", 3.0), ("b", 1.0)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": f"{name} {text}"}) + "\n" for text in TEXTS))
        sources.append(SourceConfig(str(path), weight))
    texts = list(pretrain_texts(DataConfig(mixture=tuple(sources))))
    sizes = {name: sum(len(text) for text in texts if text.startswith(name)) for name in "ab"}
    assert 2970 < sizes["a"] <= 3000 and 970 < sizes["b"] <= 1000
