"""The graph of references, with jobs that only write down what is asked of them."""

import json
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from llm_jax.base.errors import Interrupted, UserError
from llm_jax.jobs import graph
from llm_jax.storage.workdir import Workdir

PRETRAIN = """
from ml_collections.config_dict import ConfigDict
def get_config(variant=""):
    return ConfigDict({"job": "pretrain", "train": {"steps": 5}})
"""
SFT = """
from ml_collections.config_dict import ConfigDict
def full():
    return ConfigDict({"job": "sft", "init_from": "pretrain.py"})
def test():
    config = full()
    config.train = {"steps": 3}
    return config
VARIANTS = {"": full, "quickstart": full, "test": test}
def get_config(variant=""):
    return VARIANTS[variant]()
"""
DPO = """
from ml_collections.config_dict import ConfigDict
def get_config(variant=""):
    return ConfigDict({"job": "preference", "init_from": "sft.py:test", "reference": "sft.py"})
"""


class Jobs:
    """Stands for the modules of all jobs."""

    def __init__(self):
        self.calls: list[tuple[str, str]] = []
        self.fail: dict[tuple[str, str], Exception] = {}
        self.after_check: dict[str, Callable[[], object]] = {}
        self.sources = "1"

    def module(self, job):
        return SimpleNamespace(
            source_manifest=lambda config: {"content": self.sources},
            **{what: lambda node, what=what: self.do(what, node) for what in ("check", "prepare", "run")},
        )

    def do(self, what, node):
        self.calls.append((what, node.name))
        if what != "check":
            assert node.workdir.read_config()["hash"] == node.hash
            with pytest.raises(UserError, match="in use"), node.workdir.lock():
                pass
        if what == "run":
            assert all(parent.is_done() for parent in node.parents.values() if isinstance(parent, graph.Node))
        if what == "check":
            self.after_check.get(node.name, lambda: None)()
        if error := self.fail.get((what, node.name)):
            raise error

    def ran(self):
        names = [name for what, name in self.calls if what == "run"]
        self.calls.clear()
        return names


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    for name, text in {"pretrain": PRETRAIN, "sft": SFT, "dpo": DPO}.items():
        (tmp_path / "configs" / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    jobs = Jobs()
    monkeypatch.setattr(graph, "job_module", jobs.module)
    return jobs


def parent(node, field="init_from") -> graph.Node:
    found = node.parents[field]
    assert isinstance(found, graph.Node)
    return found


def folders(tmp_path):
    return sorted(p.name.rsplit("-", 1)[0] for p in (tmp_path / "runs").iterdir())


def hf_folder(path, weights="model.safetensors", content=b"weights"):
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text('{"model_type": "llama"}')
    (path / weights).write_bytes(content)
    return path


def native_folder(path, step=100, content="{}"):
    commit = path / "checkpoints" / f"step_{step:08d}" / "commit.json"
    commit.parent.mkdir(parents=True)
    commit.write_text(content)
    (path / "model.json").write_text("{}")
    return path


def test_everything_is_checked_then_prepared_then_run_parents_first(jobs, tmp_path):
    root = graph.run("configs/dpo.py")
    order = ["pretrain", "sft-test", "sft", "dpo"]
    assert jobs.calls == [(what, name) for what in ("check", "prepare") for name in order] + [("run", n) for n in order]
    assert folders(tmp_path) == ["dpo", "pretrain", "sft", "sft-test"]
    assert parent(root).name == "sft-test" and parent(root, "reference").name == "sft"
    # One pretraining run serves both.
    assert parent(parent(root)) is parent(parent(root, "reference"))
    record = json.loads((root.workdir.path / "config.json").read_text())
    assert record.keys() == {"format", "name", "job", "hash", "config", "sources", "parents"}
    assert record["config"]["train"]["steps"] == 1000
    assert record["parents"]["init_from"]["hash"] == parent(root).hash


def test_what_is_done_is_reused_and_said_so(jobs, capsys):
    graph.run("configs/sft.py")
    assert jobs.ran() == ["pretrain", "sft"]
    root = graph.run("configs/sft.py")
    assert jobs.calls == []
    assert capsys.readouterr().err.endswith(f"sft: already done, {root.workdir}\n")
    # Two names of one variant are one run.
    graph.run("configs/sft.py:quickstart")
    assert jobs.ran() == []
    graph.run("configs/sft.py:test")
    assert jobs.ran() == ["sft-test"]
    graph.run("configs/dpo.py")
    assert jobs.ran() == ["dpo"]


def test_ancestors_of_what_is_done_are_not_needed(jobs, tmp_path):
    root = graph.run("configs/sft.py")
    jobs.calls.clear()
    for path in (tmp_path / "runs").glob("pretrain-*/done.json"):
        path.unlink()
    graph.run("configs/sft.py")
    assert jobs.calls == []
    assert root.is_done()


def test_it_says_what_it_does_and_bad_input_only_that(jobs, capsys):
    jobs.fail["check", "sft"] = UserError("mine.jsonl, line 3: no 'messages'")
    with pytest.raises(UserError):
        graph.run("configs/sft.py")
    assert capsys.readouterr().err == ""
    jobs.fail.clear()
    sft = graph.run("configs/sft.py")
    assert capsys.readouterr().err.splitlines() == [
        "preparing pretrain, sft",
        f"pretrain: begins in {parent(sft).workdir}",
        f"sft: begins in {sft.workdir}",
        f"sft: done, {sft.workdir}",
    ]


def test_an_interrupted_chain_goes_on_where_it_was(jobs):
    jobs.fail["run", "sft-test"] = Interrupted("stopped at step 3")
    with pytest.raises(Interrupted):
        graph.run("configs/dpo.py")
    assert jobs.ran() == ["pretrain", "sft-test"]
    jobs.fail.clear()
    graph.run("configs/dpo.py")
    assert jobs.ran() == ["sft-test", "sft", "dpo"]


@pytest.mark.parametrize("what", ["check", "prepare"])
def test_bad_input_of_the_last_ends_the_chain_before_the_first_trains(jobs, tmp_path, what):
    jobs.fail[what, "dpo"] = UserError("pairs.jsonl, line 3: no 'chosen'")
    with pytest.raises(UserError):
        graph.run("configs/dpo.py")
    assert jobs.ran() == []
    assert (tmp_path / "runs").exists() == (what == "prepare")


def test_prepare_trains_nothing(jobs):
    root = graph.prepare("configs/sft.py")
    assert jobs.calls == [("check", "pretrain"), ("check", "sft"), ("prepare", "pretrain"), ("prepare", "sft")]
    assert not root.is_done()
    with root.workdir.lock():
        pass


def test_the_hash_covers_fields_sources_and_parents_but_not_how_it_is_spread_or_saved(jobs):
    def digest(*overrides):
        return graph.resolve("configs/sft.py", overrides).hash

    base = digest()
    for field, value in {
        "mesh.tensor": "2",
        "mesh.zero": "3",
        "train.log_every": "1",
        "train.checkpoint.every": "7",
        "train.checkpoint.keep_last": "5",
        "train.steps": "1000",  # the default
        "init_from": "configs/pretrain.py",  # another name of the same
    }.items():
        assert digest((field, value)) == base, field
    others = {
        digest(("train.steps", "7")),
        digest(("train.seed", "1")),
        digest(("train.checkpoint.export", "false")),
        digest(("data.window", "64")),
        digest(("init_from", "none")),
    }
    assert len(others) == 5 and base not in others
    jobs.sources = "2"
    assert digest() != base


def test_a_changed_parent_is_another_parent(jobs, tmp_path):
    first = graph.run("configs/sft.py")
    (tmp_path / "configs" / "pretrain.py").write_text(PRETRAIN.replace("5", "6"))
    jobs.calls.clear()
    second = graph.run("configs/sft.py")
    assert jobs.ran() == ["pretrain", "sft"]
    assert first.workdir.path != second.workdir.path


def test_overrides_apply_to_the_named_config_only(jobs):
    root = graph.resolve("configs/sft.py", [("train.steps", "7")])
    assert root.config.train.steps == 7
    assert parent(root).config.train.steps == 5


def test_references_are_found_beside_the_file_that_makes_them(jobs, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert parent(graph.resolve("../configs/sft.py")).name == "pretrain"
    # What is typed is relative to where it was typed.
    (tmp_path / "elsewhere" / "pretrain.py").write_text(PRETRAIN.replace("5", "9"))
    root = graph.resolve("../configs/sft.py", [("init_from", "pretrain.py")])
    assert parent(root).config.train.steps == 9
    assert parent(graph.resolve("../configs/sft.py")).config.train.steps == 5


@pytest.mark.parametrize(
    "config, overrides, said",
    [
        ("configs/pretrain.py", [("init_from", "configs/dpo.py")], "cycle of references: configs/pretrain.py -> "),
        ("configs/sft.py", [("init_from", "configs/sft.py")], "configs/sft.py -> configs/sft.py"),
        ("configs/sft.py", [("init_from", "configs/sfd.py")], "no such config file; the nearest is configs/sft.py"),
        ("configs/dpo.py", [("reference", "sft.py:tset")], "reference=sft.py:tset: unknown variant 'tset' of sft.py"),
        ("configs/sft.py", [("init_from", "org/name")], "init_from=org/name is neither a config file, a workdir nor"),
        ("configs/sft.py", [("init_from", "empty")], "init_from=empty is neither a config file, a workdir nor"),
        ("configs/sft.py", [("init_from", "weights.bin")], "init_from=weights.bin is a pickle; only safetensors"),
        ("configs/sft.py", [("init_from", "pickled")], "has its weights in pytorch_model.bin, a pickle; only"),
        ("configs/sft.py", [("init_from", "weightless")], "has a config.json but no safetensors"),
        ("configs/sft.py", [("init_from", "young")], "init_from=young is a workdir without a checkpoint"),
    ],
)
def test_references_that_lead_nowhere(jobs, tmp_path, config, overrides, said):
    (tmp_path / "empty").mkdir()
    (tmp_path / "weights.bin").touch()
    hf_folder(tmp_path / "pickled", "pytorch_model.bin")
    hf_folder(tmp_path / "weightless", "README.md")
    native_folder(tmp_path / "young")
    (tmp_path / "young/checkpoints/step_00000100/commit.json").unlink()
    with pytest.raises(UserError) as e:
        graph.run(config, overrides)
    assert said in str(e.value) and "\n" not in str(e.value)
    assert jobs.calls == [] and not (tmp_path / "runs").exists()


def test_folders_as_parents(jobs, tmp_path):
    def resolved():
        return graph.resolve("configs/sft.py", [("init_from", "model")])

    hf_folder(tmp_path / "model")
    node = resolved()
    assert str(node.parents["init_from"]) == str(tmp_path / "model")
    hf_folder(tmp_path / "model", content=b"weighty")
    assert resolved().hash != node.hash
    hf_folder(tmp_path / "model")
    assert resolved().hash == node.hash
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    assert resolved().hash != node.hash


def test_a_workdir_as_parent_is_known_by_its_newest_checkpoint(jobs, tmp_path):
    def digest():
        return graph.resolve("configs/sft.py", [("init_from", "run")]).hash

    native_folder(tmp_path / "run", 100, '{"files": 1}')
    first = digest()
    (tmp_path / "run" / "metrics.jsonl").write_text("{}")
    assert digest() == first
    native_folder_commit = tmp_path / "run" / "checkpoints" / "step_00000200" / "commit.json"
    native_folder_commit.parent.mkdir()
    assert digest() == first
    native_folder_commit.write_text('{"files": 2}')
    assert digest() != first


def test_an_explicit_workdir_goes_on_with_what_may_change(jobs, tmp_path):
    first = graph.run("configs/pretrain.py", (), "mine")
    assert str(first.workdir) == "mine" and not (tmp_path / "runs").exists()
    jobs.calls.clear()
    graph.run("configs/pretrain.py", [("train.log_every", "1"), ("mesh.tensor", "2")], "mine")
    assert jobs.ran() == []
    longer = [("train.steps", "9"), ("train.eval_every", "3"), ("train.checkpoint.every", "2")]
    jobs.fail["run", "pretrain"] = Interrupted("stopped")
    with pytest.raises(Interrupted):
        graph.run("configs/pretrain.py", longer, "mine")
    assert jobs.ran() == ["pretrain"]
    assert not Workdir("mine").is_done()
    assert Workdir("mine").read_config()["config"]["train"]["steps"] == 9
    jobs.fail.clear()
    assert graph.run("configs/pretrain.py", longer, "mine").is_done()


@pytest.mark.parametrize(
    "config, overrides, said",
    [
        (
            "configs/sft.py",
            [("train.seed", "3"), ("data.window", "64"), ("train.log_every", "1")],
            "workdir mine was made with another configuration; changed: data.window: 256 -> 64, train.seed: 0 -> 3",
        ),
        ("configs/sft.py", [("train.steps", "10")], "changed: train.steps: 1000 -> 10"),
        ("configs/sft.py", [("train.optimizer.groups", '[{"match": "x"}]')], "changed: train.optimizer.groups: [] ->"),
        ("configs/sft.py", [("init_from", "none")], "pretrain-"),
        ("configs/pretrain.py", [], "changed: job: sft -> pretrain"),
    ],
)
def test_an_explicit_workdir_of_another_config_is_left_alone(jobs, tmp_path, config, overrides, said):
    graph.run("configs/sft.py", (), "mine")
    before = (tmp_path / "mine" / "config.json").read_bytes()
    jobs.calls.clear()
    with pytest.raises(UserError) as e:
        graph.run(config, overrides, "mine")
    assert said in str(e.value)
    assert jobs.calls == [] and Workdir("mine").is_done()
    assert (tmp_path / "mine" / "config.json").read_bytes() == before


def test_an_explicit_workdir_of_other_data(jobs):
    graph.run("configs/pretrain.py", (), "mine")
    jobs.sources = "2"
    with pytest.raises(UserError, match="changed: the content of the data"):
        graph.run("configs/pretrain.py", (), "mine")


def test_a_folder_of_other_things_is_no_workdir(jobs, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").touch()
    (tmp_path / "note").touch()
    with pytest.raises(UserError, match="workdir thesis is neither empty nor the workdir of a run"):
        graph.run("configs/pretrain.py", (), "thesis")
    with pytest.raises(UserError, match="workdir note is a file"):
        graph.run("configs/pretrain.py", (), "note")
    hf_folder(tmp_path / "model")
    with pytest.raises(UserError, match="workdir model is neither"):
        graph.run("configs/pretrain.py", (), "model")
    with pytest.raises(UserError, match="workdir note/below can't be written to: Not a directory"):
        graph.run("configs/pretrain.py", (), "note/below")
    assert jobs.ran() == []


def test_a_workdir_in_use_ends_the_chain_before_anything_is_prepared(jobs, tmp_path):
    with Workdir("mine").lock():
        with pytest.raises(UserError, match="workdir mine is in use by process"):
            graph.run("configs/sft.py", (), "mine")
    assert [what for what, _ in jobs.calls] == ["check", "check"]
    assert not (tmp_path / "runs").exists()
    graph.run("configs/sft.py", (), "mine")
    assert jobs.ran() == ["pretrain", "sft"]


def test_what_another_process_finished_meanwhile_is_not_made_again(jobs):
    done = graph.run("configs/pretrain.py")
    jobs.calls.clear()
    mark = done.workdir.done.read_text()
    done.workdir.done.unlink()
    jobs.after_check["pretrain"] = lambda: done.workdir.done.write_text(mark)
    graph.run("configs/sft.py")
    assert jobs.ran() == ["sft"]


def test_two_files_that_say_the_same_are_one_run(jobs, tmp_path):
    (tmp_path / "copies").mkdir()
    (tmp_path / "copies" / "sft.py").write_text(SFT.replace("pretrain.py", "../configs/pretrain.py"))
    graph.run("configs/dpo.py", [("reference", "copies/sft.py:test")])
    assert jobs.ran() == ["pretrain", "sft-test", "dpo"]
