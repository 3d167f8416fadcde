"""Files of a run, damaged or edited: one clear line that names the file, or what was written."""

import dataclasses
import json

import jax
import pytest
from toy_run import tiny_model, tiny_params

from moe_jax.core import files
from moe_jax.core.errors import UserError
from moe_jax.data.modules import resolve
from moe_jax.interop.streamed_checkpoint import Promise, save_params
from moe_jax.model.task_moe import parameter_shapes
from moe_jax.report import inputs
from moe_jax.runs import directory, gin_files
from moe_jax.runs.config import Config, DataConfig, FewShotConfig, RunConfig
from moe_jax.runs.configurables import build
from moe_jax.runs.load import load_run
from moe_jax.runs.mixtures import prepare_mixtures
from moe_jax.training.logs import MetricsLog
from moe_jax.unseen.adaptation import _read_rows

DATA = DataConfig(lengths={"inputs": 8, "targets": 4})
RUN = {"task": "a", "metric": "m", "start": "moe", "seed": 1, "learning_rate": 1, "batch_size": 8,
       "dev_score": 0.5, "test_score": None}  # fmt: skip
ROWS = [{"step": 1, "kind": "train", "loss": 2.5}, {"step": 2, "kind": "eval", "mean_score": 0.5}]
# File -> how it is written, how it is read.
FILES = {
    "config.json": (lambda d: directory.write_config(d, Config(RunConfig(), DATA)),
                    directory.read_config),
    "task_table.json": (lambda d: directory.write_task_table(d, ["a", "b"]),
                        directory.read_task_table),
    "metrics.jsonl": (lambda d: files.write_jsonl(d / "metrics.jsonl", ROWS),
                      lambda d: inputs.read_run("run", d)),
    "runs.jsonl": (lambda d: files.write_jsonl(d / "runs.jsonl", [RUN]), inputs.read_finetune),
    "done.json": (lambda d: files.write_json(d / "done.json", {"a": 1}),
                  lambda d: files.read_json(d / "done.json")),
}  # fmt: skip
BAD = [b"", b"\xff\xfe\x00", b"[" * 10**5, b"nonsense", b'{"a": 1, "a": 2}', b'{"a": NaN}',
       b'{"a": -Infinity}', b'{"a": 1e999}', b"9" * 5000, b'{"a": "\xc3"}\n',
       b"\x00" * 64]  # fmt: skip
NO_OBJECT = [b"[1, 2]\n", b"3\n", b'"text"\n', b"null\n", b'{"step": 1}\n[2]\n']


@pytest.mark.parametrize("name", FILES)
def test_what_cannot_be_read_is_one_line(name, tmp_path):
    write, read = FILES[name]
    write(tmp_path)
    assert read(tmp_path)
    path = tmp_path / name
    for content in BAD + (NO_OBJECT if name != "done.json" else []):
        if not content.strip() and name.endswith((".jsonl", ".gin")):
            continue  # which is no line
        path.write_bytes(content)
        with pytest.raises(UserError) as error:
            read(tmp_path)
        assert str(tmp_path) in str(error.value) and "\n" not in str(error.value), content


@pytest.mark.parametrize(("name", "change", "message"), [
    ("task_table.json", {"tasks": ["a", "b", "a"]}, "'a' is there twice"),
    ("metrics.jsonl", {"step": True}, "has no integer 'step'"),
    ("metrics.jsonl", {"loss": "low"}, "'loss' is 'low'"),
    ("runs.jsonl", {"seed": "1"}, "seed is '1', not a whole number"),
    ("runs.jsonl", {"dev_score": None}, "dev_score is None, not a finite number"),
    ("config.json", {"RunConfig.seed\nx": 1}, r"'RunConfig.seed\nx' is no setting"),
])  # fmt: skip
def test_values_that_cannot_be(name, change, message, tmp_path):
    write, read = FILES[name]
    write(tmp_path)
    path = tmp_path / name
    lines = path.read_text().splitlines() if name.endswith("l") else [path.read_text()]
    path.write_text("".join(json.dumps(json.loads(line) | change) + "\n" for line in lines))
    with pytest.raises(UserError) as error:
        read(tmp_path)
    assert str(tmp_path) in str(error.value) and message in str(error.value)


def test_a_run_goes_on_after_whatever_a_kill_has_left(tmp_path):
    """Of metrics.jsonl and runs.jsonl; whole lines are kept."""
    half = b'\xff{"step": 3}\n[1]\n{"kind": "x"}\n{"step": 9, "kind": "train"}\n{"step": 2, "k'
    files.write_jsonl(tmp_path / "metrics.jsonl", ROWS)
    with open(tmp_path / "metrics.jsonl", "ab") as f:
        f.write(half)
    log = MetricsLog(tmp_path, step=2)
    log.close()
    assert log.scores == {2: 0.5}
    assert list(files.read_jsonl(tmp_path / "metrics.jsonl")) == ROWS
    files.write_jsonl(tmp_path / "runs.jsonl", [RUN, RUN])
    with open(tmp_path / "runs.jsonl", "ab") as f:
        f.write(b'{"task": "\xc3')
    assert _read_rows(tmp_path / "runs.jsonl") == [RUN, RUN]


def test_a_setting_that_the_checkpoint_does_not_have_is_named(tmp_path):
    model = tiny_model(tasks=1, experts=2)
    params = tiny_params(model)
    meta = {"tasks": ["a"], "step": 1, "shapes": parameter_shapes(params)}
    save_params(tmp_path, 1, jax.tree.map(lambda a: Promise(a.shape, lambda: a), params), meta)
    own, router = model.config, model.router_config
    directory.write_config(tmp_path, Config(RunConfig(), DATA, own, router))
    other = dataclasses.replace(own, experts=3)
    with pytest.raises(UserError, match=r"needs shape .*; the run has ModelConfig.experts = 2$"):
        load_run(str(tmp_path), other, router, 0)


def test_a_few_shot_directory_is_no_training_run(tmp_path):
    directory.write_config(tmp_path, FewShotConfig(RunConfig(), DATA))
    with pytest.raises(UserError, match=r"config\.json: there is no setting 'FinetuneConfig\."):
        directory.read_config(tmp_path)


def test_keys_and_numbers_are_told_by_name(tmp_path):
    path = tmp_path / "a.json"
    for text, message in (
        ('{"a": {"b": 1, "c": 2, "b": 3}}', "the key 'b' is there twice"),
        ('{"a": 1e400}', "1e400 is no finite number"),
        ("[NaN]", "NaN is no finite number"),
        (r'{"a": "\ud800"}', r"'\\ud800' is half a character"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=f"{path} is not valid JSON: {message}"):
            files.read_json(path)
    path.write_text(r'{"a": [1, 2.5e-3, -7, "x", "\ud83d\ude00", null, true]}')
    assert files.read_json(path) == json.loads(path.read_text())


def test_a_run_is_read_and_not_executed(tmp_path, monkeypatch):
    """Neither what its files name, nor lines of gin."""
    run, proof = tmp_path / "run", tmp_path / "executed"
    evil = f"import pathlib\npathlib.Path({str(proof)!r}).touch()\n"
    run.mkdir()
    (tmp_path / "evil.py").write_text(evil)
    monkeypatch.chdir(tmp_path)
    given = [f"MODEL_DIR = {str(run)!r}", "CACHE_DIR = 'cache'"]
    for lines, message in (
        ({"RunConfig.extensions": [f"{tmp_path}/evil.py"]}, "names the module"),
        ({"RunConfig.extensions": ["a\nb"]}, r"'a\\nb' is no module's name"),
        ({"RunConfig.extensions": "evil"}, r"names the module evil: .* --gin\.EXTENSIONS=evil$"),
        ({"EXTENSIONS": ["evil.py"]}, "is no setting"),
        ({"import evil\nModelConfig.experts": 3}, "is no setting"),
        ({"RunConfig.seed = 1\nimport evil #": 3}, "is no setting"),
    ):
        files.write_json(run / "config.json", lines)
        with pytest.raises(UserError, match=message):
            gin_files.parse([], given, [], from_model_dir=True)
    # What may not be needed is refused where it is.
    for lines in (
        {"DataConfig.task_modules": ["evil.py"]},
        {"VocabularyConfig.factory": "evil.py:make", "VocabularyConfig.kind": "seqio",
         "DataConfig.task_modules": []},
    ):  # fmt: skip
        lines["DataConfig.mixture_or_task_name"] = "a"
        files.write_json(run / "config.json", lines)
        gin_files.parse([], given, [], from_model_dir=True)
        with pytest.raises(UserError, match=f"{run} names the .*evil.py.*: if you trust its code"):
            prepare_mixtures(build(Config).data, run=str(run))
    # A config.gin is not looked at, nor executed.
    files.write_json(run / "config.json", {"RunConfig.seed": 3})
    (run / "config.gin").write_text("import evil\nRunConfig.seed = @evil.x()\n")
    gin_files.parse([], given, [], from_model_dir=True)
    assert not proof.exists()


@pytest.mark.parametrize("line", [
    "EXTENSIONS = ('mine.py',)", "import mine", "TASK_MODULES = 'mine'",
    "RunConfig.extensions = ['mine']",
])  # fmt: skip
def test_what_the_user_gives_is_imported(line, tmp_path, monkeypatch):
    """On the command line or in a gin file, whatever the run names."""
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "mine.py").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    stored = "mine" if "'mine.py'" not in line else str(tmp_path / "mine.py")
    files.write_json(run / "config.json", {"RunConfig.extensions": [stored]})
    given = [f"MODEL_DIR = {str(run)!r}"]
    with pytest.raises(UserError, match="names the module"):
        gin_files.parse([], given, [], from_model_dir=True)
    (tmp_path / "mine.gin").write_text(f"{line}\n")
    gin_files.parse([tmp_path / "mine.gin"], given, ["."], from_model_dir=True)


@pytest.mark.parametrize("name", ["subprocess:call", "os:system", "os.path:join", "builtins:exec"])
def test_functions_of_python_itself_are_no_metrics(name):
    with pytest.raises(UserError, match=r"of Python's own library is not called by name"):
        resolve(name)
