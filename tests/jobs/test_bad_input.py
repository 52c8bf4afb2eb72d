"""Bad input of every kind the README promises: status 2, one line naming the thing, nothing trained, nothing harmed.

Everything goes through the command's own door, in this process: the message is what a person sees.
"""

import io
import json
import os
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from llm_jax.base.door import run_door
from llm_jax.main import main
from llm_jax.storage.workdir import Workdir
from tests.jobs.conftest import CONFIGS

PAIR = {"prompt": "Say a word.", "chosen": "One.", "rejected": "Two."}
TURN = {"prompt": "Say a word.", "completion": "One."}
LABELLED = TURN | {"label": True}
SAME = PAIR | {"rejected": "One."}
BLANK = PAIR | {"chosen": " "}
TALK = [{"role": "user", "content": "Say a word."}, {"role": "assistant", "content": "One."}]
OTHER = [{"role": "user", "content": "Say a word."}, {"role": "assistant", "content": "Two."}]


def lines(*records: object) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(capsys, *arguments: str) -> str:
    """Runs the command, expects status 2 and exactly one line of error, and returns it."""
    capsys.readouterr()
    status = run_door(main, arguments)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(errors) == 1, (status, errors)
    return errors[0]


def nothing_trained(folder: Path) -> bool:
    return not list(folder.glob("**/checkpoints")) and not list(folder.glob("**/metrics.jsonl"))


LONG = [TURN | {"prompt": f"{i} words " * 900} for i in range(80)]
CHATS = [{"messages": [{"role": r, "content": f"{r} {i}"} for r in ("user", "assistant")]} for i in range(80)]
EMPTY_MASK = "{% for m in messages %}{{ m.content }}{% generation %}{% endgeneration %}{% endfor %}"
CHAT_FLAGS = "data.path=a.jsonl --config.data.chat_template=t.jinja"
CYCLE = """from ml_collections import ConfigDict

def get_config():
    return ConfigDict({"job": "sft", "init_from": "cycle.py"})
"""
PICKLE = {"weights/config.json": '{"model_type": "llama"}', "weights/pytorch_model.bin": b"x"}
TOKENIZER = {
    "tok/tokenizer.json": '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}',
    "tok/tokenizer_config.json": '{"eos_token": "a"}',
}


TASKS = "seqio:tests.data.readers.seqio_tasks"


def table(kind: str, **columns: list) -> bytes:
    """A Parquet or an Arrow file."""
    out, made = io.BytesIO(), pyarrow.table(columns)
    if kind == "parquet":
        pyarrow.parquet.write_table(made, out)
    else:
        with pyarrow.ipc.new_stream(out, made.schema) as writer:
            writer.write_table(made)
    return out.getvalue()


TEXTS = table("parquet", text=[f"text {i}" for i in range(50)])


def of_file(config: str, content: str | bytes, *said: str):
    return config, {"a.jsonl": content}, "data.path=a.jsonl", said


@pytest.mark.parametrize(
    ("config", "files", "override", "said"),
    [
        ("dpo.py:test", {}, "data.windw=64", ["data.windw", "data.window"]),
        ("dpo.py:test", {}, "beta=strong", ["beta", "strong", "float"]),
        ("dpo.py:tset", {}, None, ["tset", "test"]),
        ("dop.py", {}, None, ["dop.py"]),
        ("dpo.py:test", {}, "data.path=gone.jsonl", ["gone.jsonl"]),
        of_file("dpo.py:test", lines(PAIR) + '{"prompt": ', "a.jsonl", "2"),
        of_file("dpo.py:test", lines(PAIR, {"prompt": "x"}), "a.jsonl:2", "chosen"),
        of_file("sft.py:test", b'{"prompt": "\xff", "completion": "a"}\n', "a.jsonl", "UTF-8"),
        of_file("sft.py:test", "", "a.jsonl"),
        of_file("sft.py:test", lines(*LONG), "a.jsonl", "window"),
        ("sft.py:test", {"a.jsonl": lines(*CHATS), "t.jinja": EMPTY_MASK}, CHAT_FLAGS, ["mask"]),
        ("pretrain.py:test", {"a.parquet": TEXTS[:-99]}, "data.path=a.parquet", ["a.parquet is not a whole Parquet"]),
        ("sft.py:test", {"a.parquet": TEXTS[:-99]}, "data.path=a.parquet", ["a.parquet is not a whole Parquet file"]),
        ("dpo.py:test", {"a.parquet": TEXTS}, "data.path=a.parquet", ["a.parquet, row 1: preference needs", "`text`"]),
        (
            "pretrain.py:test",
            {"a.arrow": table("arrow", text=[1, 2, 3])},
            "data.path=a.arrow",
            ["a.arrow, row 1: `text` has to be a string, not int"],
        ),
        ("pretrain.py:test", {"a.arrow": b"x" * 99}, "data.path=a.arrow", ["a.arrow is not a whole Arrow file"]),
        ("pretrain.py:test", {"a.array_record": b"x"}, "data.path=a.array_record", ["not a whole ArrayRecord file"]),
        ("pretrain.py:test", {"a/state.json": "{}", "a/dataset_info.json": ""}, "data.path=a", ["a/state.json names"]),
        ("pretrain.py:test", {}, f"data.path={TASKS}:lj_text", ["no task or mixture 'lj_text'", "nearest is lj_texts"]),
        ("pretrain.py:test", {}, "data.path=seqio:no_such:x", ["the module no_such does not import"]),
        ("pretrain.py:test", {}, "data.path=hub:no/such", ["the dataset no/such is not in the cache"]),
        (
            "pretrain.py:test",
            {"t/tokenizer.model": b"x"},
            "tokenizer.path=t",
            ["t/tokenizer.model is no SentencePiece"],
        ),
        ("pretrain.py:test", {}, "tokenizer.kind=unigram", ["tokenizer.kind", "sentencepiece_unigram"]),
        ("sft.py:test", {}, "init_from=nowhere", ["init_from", "nowhere"]),
        ("sft.py:test", PICKLE, "init_from=weights", ["pytorch_model.bin", "safetensors"]),
        ("sft.py:test", {}, "mesh.data=3", ["mesh", "3"]),
        ("sft.py:test", {}, "mesh.tensor=8", ["tensor", "8"]),
        ("sft.py:test", {}, "train.batch_size=9", ["batch_size", "9"]),
        ("pretrain.py:test", {}, "data.path=.", ["."]),
        ("dpo.py:test", {}, "beta=0", ["beta is 0.0; it must be positive"]),
        ("dpo.py:test", {}, "loss_type=sigmod", ["loss_type=sigmod: no such loss", "nearest is sigmoid"]),
        ("dpo.py:test", {}, "loss_type=ipo,kto", ["losses of pairs and of unpaired answers", "ipo of pairs"]),
        ("dpo.py:test", {}, "loss_type=ipo,ipo", ["loss_type names ipo twice"]),
        ("dpo.py:test", {}, "loss_weights=[1,2]", ["loss_weights has 2 numbers for 1 losses"]),
        ("dpo.py:test", {}, "loss_weights=(0,)", ["loss_weights=(0.0,): no weight may be negative, and one has to be"]),
        ("dpo.py:test", {}, "label_smoothing=0.5", ["label_smoothing is 0.5"]),
        ("ipo.py:test", {}, "label_smoothing=0.1", ["label_smoothing=0.1 is set, but loss_type=ipo does not read it"]),
        ("dpo.py:test", {}, "simpo_gamma=1", ["simpo_gamma=1.0 is set, but loss_type=sigmoid", "simpo"]),
        ("kto.py:test", {}, "ld_alpha=0.5", ["ld_alpha=0.5 is set, but loss_type=kto does not read it"]),
        ("dpo.py:test", {}, "loss_type=exo_pair", ["exo_pair", "label_smoothing, which is 0"]),
        (
            "dpo.py:test",
            {},
            "loss_type=nca_pair,dpo --config.f_divergence_type=js",
            ["js is not defined for loss_type=nca_pair"],
        ),
        ("dpo.py:test", {}, "f_alpha_divergence_coef=0.3", ["f_alpha_divergence_coef=0.3", "reverse_kl does not read"]),
        (
            "dpo.py:test",
            {},
            "use_weighting=true --config.loss_type=aot",
            ["use_weighting=True", "aot has no loss of a"],
        ),
        (
            "dpo.py:test",
            {},
            "reference_logps=none",
            ["reference_logps=none", "sigmoid is measured against a reference (cpo is without one)"],
        ),
        (
            "dpo.py:test",
            {},
            "reference_logps=none --config.loss_type=hinge",
            ["hinge is measured against a reference (cpo_hinge is without one)"],
        ),
        ("dpo.py:test", {}, "running_delta=true", ["running_delta=True", "sigmoid has no reward shift (bco, "]),
        ("dpo.py:test", {}, "sync_ref_model=true", ["sync_ref_model=True", "set live"]),
        ("dpo.py:test", {}, "ref_model_sync_steps=5", ["ref_model_sync_steps=5 is set, but only sync_ref_model=True"]),
        ("dpo.py:test", {}, "loss_type=sppo", ["sppo needs `chosen_score` of every pair"]),
        (
            "dpo.py:test",
            {"a.jsonl": lines(*(PAIR | {"chosen_score": x, "rejected_score": 0} for x in (1, 8.5)))},
            "data.path=a.jsonl --config.loss_type=sppo",
            ["a.jsonl:2: `chosen_score` is 8.5; loss_type=sppo takes it for a probability"],
        ),
        ("dpo.py:test", {}, "adapter.r=0", ["adapter.r has 0; a rank is at least 1"]),
        ("dpo.py:test", {}, "data.unpair=true", ["data.unpair=True is set"]),
        ("kto.py:test", {}, "data.share_prompts=true", ["data.share_prompts=True is set, but no record of unpaired"]),
        ("orpo.py:test", {}, "data.share_prompts=true", ["data.share_prompts: loss_type=orpo takes the likelihood of"]),
        (
            "dpo.py:test",
            {},
            "data.share_prompts=true --config.train.neftune_noise_alpha=5",
            ["data.share_prompts: train.neftune_noise_alpha"],
        ),
        (
            "reward.py:test",
            {},
            "data.share_prompts=true --config.pooling=mean --config.train.checkpoint.export=false",
            ["data.share_prompts: pooling=mean"],
        ),
        ("reward.py:test_steps", {}, "data.share_prompts=true", ["data.share_prompts=True", "no record of steps"]),
        ("sft.py:test", {}, "data.on_unusable=error", ["data.on_unusable=error is set, but no record of sft reads it"]),
        of_file(
            "dpo.py:test", lines(PAIR, LABELLED), "a.jsonl:2: unpaired records (with a `label`)", "losses are of pairs"
        ),
        of_file("kto.py:test", lines(LABELLED, PAIR), "a.jsonl:2: a pair (`chosen`+`rejected`)", "data.unpair=True"),
        of_file("kto.py:test", lines(LABELLED, TURN), "a.jsonl:2: unpaired needs `prompt`+`completion`+`label`"),
        of_file("kto.py:test", lines(LABELLED, LABELLED | {"label": "good"}), "a.jsonl:2: `label` is 'good'"),
        of_file("dpo.py:test", lines(PAIR, PAIR | {"weight": -1}), "a.jsonl:2: `weight` is -1"),
        of_file(
            "dpo.py:test",
            lines(PAIR, {"prompt": "Say it.", "chosen": TALK, "rejected": OTHER}),
            "a.jsonl:2: `prompt` is no prefix of `chosen`",
        ),
        (
            "dpo.py:test",
            {"a.jsonl": lines(PAIR, SAME)},
            "data.path=a.jsonl --config.loss_type=sppo",
            ["a.jsonl:1: loss_type=sppo needs `chosen_score`"],
        ),
        ("dpo.py:test", {}, "train.optimizer.warmup_steps=99", ["warmup_steps is 99", "4 steps"]),
        ("sft.py:test", {}, "train.optimizer.groups=({'match':'nothing'},)", ["'nothing'", "no parameter"]),
        ("sft.py:test", {}, "train.optimizer.decay_steps=2", ["decay_steps", "cosine"]),
        ("pretrain.py:test", {}, "train.optimizer.schedule=constant", ["final_fraction", "constant"]),
        ("sft.py:test", {}, "train.optimizer.rule=muno", ["train.optimizer.rule=muno", "muon"]),
        ("sft.py:test", {}, "train.optimizer.lion.beta1=0.5", ["optimizer.lion.beta1", "rule=adamw ignores it"]),
        ("dpo.py:test", {}, "train.optimizer.groups=({'match':'norm','rule':'muon'},)", ["'norm'", "muon", "matrix"]),
        ("sft.py:test", {}, "train.freeze=('layers.9.mlp',)", ["layers.9.mlp", "nearest is layers.0.mlp"]),
        ("sft.py:test", {}, "train.attention_dropout=1", ["train.attention_dropout is 1.0"]),
        ("sft.py:test", {}, "train.ema_decay=2", ["train.ema_decay is 2.0"]),
        ("pretrain.py:test", {}, "train.z_loss=-1", ["train.z_loss is -1.0"]),
        ("sft.py:test", {}, "train.neftune_noise_alpha=0", ["train.neftune_noise_alpha is 0.0"]),
        ("sft.py:test", {}, "train.log_every=0", ["train.log_every is 0; it must be at least 1"]),
        ("sft.py:test", {}, "train.microbatches=0", ["train.microbatches is 0; it must be at least 1"]),
        ("sft.py:test", {}, "task_eval.problems=-3", ["task_eval.problems is -3; it must be at least 0"]),
        ("sft.py:test", {}, "data.max_records=5", ["data.max_records", "data.path"]),
        ("sft.py:docstrings", {"a.jsonl": lines(TURN)}, "data.path=a.jsonl", ["data.embedded", "a.jsonl"]),
        ("pretrain.py:test", {}, "data.embedded=docstrings", ["data.embedded", "pretrain"]),
        (
            "pretrain.py:test",
            TOKENIZER,
            "tokenizer.path=tok",
            ["tokenizer.vocab_size", "tokenizer.path"],
        ),
        ("cycle.py", {"cycle.py": CYCLE}, None, ["cycle"]),
    ],
)
def test_it_is_refused_before_anything_is_trained(folder, capsys, config, files, override, said):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    own = folder / config
    arguments = [] if override is None else f"--config.{override}".split()
    message = refusal(capsys, f"--config={own if own.exists() else CONFIGS / config}", *arguments)
    for word in said:
        assert word in message, message
    assert nothing_trained(folder)


@pytest.mark.parametrize(
    ("records", "said"),
    [
        ([PAIR, SAME], "a.jsonl:2: `chosen` and `rejected` are equal, so nothing can be learned of it"),
        ([PAIR, BLANK], "a.jsonl:2: `chosen` is empty, so nothing can be learned of it"),
        (
            [PAIR, {"prompt": "q", "chosen": "a " * 90 + "b", "rejected": "a " * 90 + "c"}],
            "a.jsonl:2: `chosen` and `rejected` are equal once cut to fit the window",
        ),
        ([PAIR | {"prompt": "q " * 90}], "a.jsonl:1: the prompt leaves no room for an answer in a window of 64"),
    ],
)
def test_pairs_of_which_nothing_can_be_learned(folder, capsys, chain, records, said):
    """With `on_unusable=error` the first is named; otherwise they are counted and left out (`data/fitting.py`)."""
    (folder / "a.jsonl").write_text(lines(*records))
    fields = ("path=a.jsonl", "eval_path=a.jsonl", "on_unusable=error", "on_long=truncate", "window=64")
    arguments = [f"--config.init_from={chain['sft'].workdir.path}", *(f"--config.data.{field}" for field in fields)]
    assert said in refusal(capsys, f"--config={CONFIGS / 'dpo.py'}:test", *arguments)
    assert nothing_trained(folder)


def test_an_adapter_that_does_not_fit_leaves_no_workdir(folder, capsys, chain):
    """The command put right may go there."""
    given = [f"--config.init_from={chain['sft'].workdir.path}", "--workdir=w"]
    given += ["--config.adapter.target_modules=('q_prj',)"]
    message = refusal(capsys, f"--config={CONFIGS / 'dpo.py'}:test", *given)
    assert "adapter.target_modules 'q_prj' matches nothing; the nearest is q_proj" in message
    assert not (folder / "w").exists()


def test_a_tokenizer_with_more_entries_than_the_checkpoint(folder, capsys, chain):
    """The parent's export with another run's tokenizer: ids that the embedding lacks."""
    export = chain["sft"].workdir.export
    broken = folder / "broken"
    broken.mkdir()
    for file in export.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((broken / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary.update({f"extra{i}": len(vocabulary) + i for i in range(200)})
    (broken / "tokenizer.json").write_text(json.dumps(tokenizer))
    message = refusal(capsys, f"--config={CONFIGS / 'sft.py'}:test", "--config.init_from=broken")
    assert "tokenizer" in message and "embedding" in message
    assert nothing_trained(folder)


def test_a_workdir_of_another_config_is_named_field_by_field_and_left_alone(folder, capsys, chain):
    workdir = chain["base"].workdir
    before = {path: path.stat().st_mtime_ns for path in Path(workdir.path).rglob("*") if path.is_file()}
    message = refusal(
        capsys, f"--config={CONFIGS / 'pretrain.py'}:test", f"--workdir={workdir.path}", "--config.train.seed=5"
    )
    assert "train.seed" in message
    after = {path: path.stat().st_mtime_ns for path in Path(workdir.path).rglob("*") if path.is_file()}
    assert after == before


def test_a_workdir_in_use_names_the_process(folder, capsys):
    with Workdir("busy").lock():
        message = refusal(capsys, f"--config={CONFIGS / 'pretrain.py'}:test", "--workdir=busy")
    assert "in use" in message and str(os.getpid()) in message


def test_a_checkpoint_of_an_unknown_format(folder, capsys, chain):
    copy = folder / "copy"
    shutil.copytree(chain["base"].workdir.path, copy)
    for commit in copy.glob("checkpoints/*/commit.json"):
        commit.write_text(json.dumps(json.loads(commit.read_text()) | {"format": 99}))
    message = refusal(capsys, f"--config={CONFIGS / 'sft.py'}:test", "--config.init_from=copy")
    assert "format 99" in message


def test_a_nan_stops_the_run_with_step_rows_and_the_last_good_checkpoint(folder, capsys):
    """A learning rate of 1e38 overflows float32 in the first update: status 1, one line."""
    arguments = ["--config.train.optimizer.learning_rate=1e38", "--config.train.checkpoint.every=1", "--workdir=nan"]
    capsys.readouterr()
    status = run_door(main, [f"--config={CONFIGS / 'pretrain.py'}:test", *arguments])
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert status == 1 and "not finite" in error and "rows" in error and "checkpoint" in error
