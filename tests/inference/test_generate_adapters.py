"""Prompts that choose among adapters: each is answered as its adapter alone answers it."""

import json

import jax
import numpy as np
import pytest

import llm_jax
from llm_jax.adapters.loading import AdaptedModel, load
from llm_jax.base.door import run_door
from llm_jax.base.errors import UserError
from llm_jax.generate import main
from llm_jax.inference import Generator, SamplingParams
from tests.adapters.conftest import drawn, write_model

FIELDS = {
    "sums": {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]},
    # Of other ranks in other layers, and on the token vectors.
    "words": {"r": 4, "target_modules": ["v_proj", "embed_tokens"], "rank_pattern": {r"layers\.1\..*": 2}},
    "law": {"r": 2, "lora_alpha": 8, "target_modules": "all-linear", "layers_to_transform": None},
}
ROWS = ["sums", None, "law", "words", "sums"]
PROMPTS = [[9, 11, 200], [14, 30], [9, 11, 200, 41, 60, 7], [8], [100, 101, 102]]
GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True, logprobs=5)


@pytest.fixture(scope="module")
def three(folder) -> AdaptedModel:
    base = load(folder)
    return AdaptedModel(base, {name: drawn(name, base, fields) for name, fields in FIELDS.items()})


@pytest.fixture(scope="module")
def folders(three, tmp_path_factory):
    """PEFT folders of the three."""
    path = tmp_path_factory.mktemp("adapters")
    llm_jax.save(three, path)
    return {name: path / name for name in FIELDS}


def alone(three: AdaptedModel, name: str | None):
    """The model with one adapter in its weights."""
    return three.base if name is None else AdaptedModel(three.base, {name: three.adapters[name]}).merged()


def values(done) -> np.ndarray:
    return np.array([value for top in done.top_logprobs for _, value in top])


def test_each_as_alone(three):
    """Caches, two samples of a prompt that share its prefill, prompts of other lengths in one batch."""
    params = [GREEDY] * 4 + [SamplingParams(max_tokens=6, seed=3, n=2, ignore_eos=True, logprobs=5)]
    mixed = Generator(three, max_batch=8).generate(PROMPTS, params, ROWS)
    assert len({tuple(done.tokens) for done in mixed}) == 6
    for done in mixed:
        generator = Generator(alone(three, ROWS[done.prompt]), max_batch=2)
        own = generator.generate([PROMPTS[done.prompt]], params[done.prompt])[done.sample]
        assert done.tokens == own.tokens
        np.testing.assert_allclose(values(done), values(own), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(done.logprobs, own.logprobs, rtol=1e-5, atol=1e-5)


def test_as_the_forward_pass(three):
    """Token by token from caches as all at once without."""
    for number, done in enumerate(Generator(three).generate(PROMPTS[:4], GREEDY, ROWS[:4])):
        tokens = np.array([PROMPTS[number] + done.tokens])
        logits = jax.nn.log_softmax(three(tokens, adapters=[ROWS[number]])[0])[len(PROMPTS[number]) - 1 : -1]
        np.testing.assert_allclose(done.logprobs, logits[np.arange(6), done.tokens], rtol=1e-5, atol=1e-5)


def test_all_where_none_is_named(three):
    """As in a call: the sum of all, here with pieces streamed."""
    expected = Generator(three.merged(), max_batch=1).generate([PROMPTS[2]], GREEDY)[0]
    pieces = list(Generator(three, max_batch=1).stream([PROMPTS[2]], GREEDY))
    assert [token for piece in pieces for token in piece.tokens] == expected.tokens
    again = list(Generator(three, max_batch=1).stream([PROMPTS[2]], GREEDY, adapters=["law"]))
    assert [token for piece in again for token in piece.tokens] != expected.tokens


def test_what_starts_at_the_weights(three):
    """PiSSA: what its updates started as is taken off in each row that has it, and in no other."""
    pissa = drawn("pissa", three.base, {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": "pissa"})
    both = AdaptedModel(three.base, {"pissa": pissa, "law": three.adapters["law"]})
    for rows in (["pissa", None], ["law", "pissa"]):
        for done, name in zip(Generator(both).generate(PROMPTS[:2], GREEDY, rows), rows):
            own = Generator(alone(both, name)).generate([PROMPTS[done.prompt]], GREEDY)[0]
            np.testing.assert_allclose(values(done), values(own), rtol=1e-5, atol=1e-5)


def test_names_that_are_refused(three):
    generator = Generator(three)
    with pytest.raises(UserError, match="there is no adapter 'tax'; there are sums, words, law"):
        generator.generate(PROMPTS[:1], GREEDY, ["tax"])
    with pytest.raises(UserError, match="1 adapters are named for 2 rows"):
        generator.generate(PROMPTS[:2], GREEDY, ["law"])
    with pytest.raises(UserError, match="adapters are named for a model that has none"):
        Generator(three.base).generate(PROMPTS[:1], GREEDY, ["law"])
    dora = drawn("dora", three.base, {"target_modules": ["q_proj"], "use_dora": True})
    with pytest.raises(UserError, match="can't choose an adapter with DoRA"):
        Generator(AdaptedModel(three.base, {"dora": dora})).generate(PROMPTS[:1], GREEDY, ["dora"])


# ---- the command


def run(capsys, *argv) -> tuple[int, str, str]:
    status = run_door(main, [str(a) for a in argv])
    out, err = capsys.readouterr()
    return status, out, err


def options(folders, *names):
    return [text for name in names for text in ("--adapter", f"{name}={folders[name]}")]


FLAGS = ("--max-tokens", 6, "--temperature", 0, "--ignore-eos")


@pytest.fixture
def asked(tmp_path):
    """A file of the prompts with their adapters."""
    file = tmp_path / "prompts.jsonl"
    records = [{"prompt_ids": ids, "adapter": name} for ids, name in zip(PROMPTS, ROWS)]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def test_a_file_whose_prompts_choose(capsys, three, folder, folders, asked, tmp_path, tiny):
    output = tmp_path / "answers.jsonl"
    argv = [folder, *options(folders, *FIELDS), "--input", asked, "--output", output, *FLAGS]
    status, _, err = run(capsys, *argv)
    assert status == 0, err
    lines = sorted(map(json.loads, output.read_text().splitlines()), key=lambda line: line["index"])
    assert [line.get("adapter") for line in lines] == ROWS
    plain = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    for line, ids, name in zip(lines, PROMPTS, ROWS):
        assert line["completion"] == Generator(alone(three, name), tiny.tokenizer).generate([ids], plain)[0].text
    assert "5 of 5 answers are in" in run(capsys, *argv)[2]
    # Another adapter than at the time of the answer.
    asked.write_text(asked.read_text().replace('"law"', '"words"'))
    status, _, err = run(capsys, *argv)
    assert status == 2 and "answers.jsonl:" in err and "was made with another adapter" in err


def test_one_adapter_for_a_prompt(capsys, three, folder, folders, tiny):
    argv = (folder, *options(folders, "law"), "--prompt-ids", "9 11 200", *FLAGS)
    plain = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    expected = Generator(alone(three, "law"), tiny.tokenizer, max_batch=1).generate([PROMPTS[0]], plain)[0].text
    assert run(capsys, *argv)[:2] == (0, expected + "\n")


@pytest.mark.parametrize(
    ("names", "record", "message"),
    [
        (["law", "sums"], {"adapter": "tax"}, "prompts.jsonl:1: there is no adapter 'tax'; there are law, sums"),
        (["law", "sums"], {}, "prompts.jsonl:1: no `adapter`, and there are law, sums: name one, or null"),
        ([], {"adapter": "law"}, "prompts.jsonl:1: `adapter` is 'law', and no adapters are given"),
        (["law", "law"], {}, "law is "),
    ],
)
def test_prompts_that_are_refused(capsys, folder, folders, tmp_path, names, record, message):
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": "x", **record}) + "\n")
    argv = (folder, *options(folders, *names), "--input", file, "--output", tmp_path / "out.jsonl")
    status, out, err = run(capsys, *argv)
    assert (status, out, len(err.splitlines())) == (2, "", 1) and message in err, err
    assert not (tmp_path / "out.jsonl").exists()


def test_adapters_that_are_refused(capsys, three, folder, folders, tmp_path):
    """Of another base: names or shapes are said, before the weights are read."""
    write_model("llama", "tied", tmp_path / "llama")
    other = load(tmp_path / "llama")
    llm_jax.save(AdaptedModel(other, {"x": drawn("x", other, {"target_modules": ["q_proj"]})}), tmp_path / "other")
    write_model("gpt2", "plain", tmp_path / "gpt2")
    gpt2 = load(tmp_path / "gpt2")
    llm_jax.save(AdaptedModel(gpt2, {"x": drawn("x", gpt2, {"target_modules": ["c_attn"]})}), tmp_path / "named")
    for given, message in (
        (["x"], "--adapter x: expected NAME=FOLDER"),
        ([f"x={folder}"], f"{folder} is neither a PEFT folder nor the workdir of a run that trained an adapter"),
        ([f"x={tmp_path / 'none'}"], "none is neither a PEFT folder"),
        ([f"x={tmp_path / 'other'}"], "lora_A.weight has shape [8, 24], an adapter of this model has [8, 32]"),
        ([f"x={tmp_path / 'named'}"], "does not fit the llama model: adapter.target_modules 'c_attn' matches nothing"),
        ([f"x={folders['law']}", f"y={folders['law']}"], "--prompt takes one --adapter"),
    ):
        flags = [text for each in given for text in ("--adapter", each)]
        status, out, err = run(capsys, folder, *flags, "--prompt", "x")
        assert (status, out, len(err.splitlines())) == (2, "", 1) and message in err, err
