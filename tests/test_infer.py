"""Answers for one task: of the task table, or a new one with its row of a file or the mean."""

import io
import json

import jax
import numpy as np
import pytest
from toy import TASKS as MODULE
from toy import toy_cache, toy_mixtures
from toy_run import SETTINGS, bindings, random_backbone, tiny_model, tiny_params

from moe_jax import eval as eval_program
from moe_jax import infer
from moe_jax.core import files
from moe_jax.core.errors import UserError
from moe_jax.evaluation import evaluator
from moe_jax.interop.streamed_checkpoint import Promise, save_params
from moe_jax.model.task_moe import routes_of
from moe_jax.runs import directory, gin_files
from moe_jax.runs.config import Config
from moe_jax.runs.configurables import build
from moe_jax.training.checkpoints import parameter_shapes

TASKS = ["toy_copy", "toy_sum"]


def write_run(model_dir, experts: int, apart: bool = False):
    """A model directory with random parameters; (model, parameters).

    Args:
        apart: neither task has the route of the mean representation.
    """
    settings = {"ModelConfig__experts": experts, "RouterConfig__selection": "argmax"}
    gin_files.parse([], bindings(model_dir, **settings), [])
    directory.write_config(model_dir, build(Config))
    model = tiny_model(
        tasks=2, experts=experts, max_positions=48, selection="argmax",
        vocabulary_size=toy_mixtures()[0].vocabulary.size,
    )  # fmt: skip
    params = tiny_params(model) | {"backbone": random_backbone(model)}
    rng = np.random.default_rng(0)
    while apart:
        table = rng.normal(size=params["representations"].shape).astype(np.float32)
        params["representations"] = table
        mean = {**params, "representations": table.mean(0, keepdims=True)}
        apart = any(np.array_equal(r, routes_of(model, mean, 3)[0])
                    for r in routes_of(model, params, 3))  # fmt: skip
    shapes = parameter_shapes(params)
    promises = jax.tree.map(lambda p: Promise(p.shape, lambda: np.asarray(p)), params)
    save_params(model_dir, 3, promises, {"tasks": TASKS, "step": 3, "shapes": shapes})
    return model, params


@pytest.fixture(scope="module")
def routed(tmp_path_factory):
    """(MODEL_DIR, model, parameters)."""
    model_dir = tmp_path_factory.mktemp("routed") / "run"
    return model_dir, *write_run(model_dir, experts=2)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    model_dir = tmp_path_factory.mktemp("dense") / "run"
    write_run(model_dir, experts=1)
    return model_dir


@pytest.fixture(scope="module")
def rows(routed, tmp_path_factory):
    """A file with a row of toy_reverse that gives another route than the mean; (path, row)."""
    _, model, params = routed
    rng = np.random.default_rng(0)
    mean = np.asarray(params["representations"]).mean(0)
    candidates = np.stack([mean, *rng.normal(size=(20, 8))]).astype(np.float32)
    routes = routes_of(model, {**params, "representations": candidates}, 3)
    other = next(i for i, route in enumerate(routes) if not np.any(route * routes[0]))
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    files.write_json(path, {"toy_reverse": candidates[other].tolist(), "toy_other": [0.0] * 8})
    return path, candidates[other]


def stdin(data: bytes):
    return io.TextIOWrapper(io.BytesIO(data))


def call(program, model_dir, **settings):
    """Runs a command in this process; a setting is one of its arguments or a macro."""
    prefix, own = (
        ("infer", infer.InferConfig)
        if program is infer.infer
        else ("eval", eval_program.EvalConfig)
    )
    values = {"MODEL_DIR": str(model_dir)} | {
        name if name.isupper() else f"{prefix}.{name}": value for name, value in settings.items()
    }
    gin_files.parse([], [f"{k} = {v!r}" for k, v in values.items()], [], from_model_dir=True)
    program(build(Config), build(own))


def test_an_unseen_task_is_answered_as_eval_answers_it(routed, rows, tmp_path, monkeypatch):
    """The route comes from its row in the file, or from the mean."""
    model_dir, model, params = routed
    path, row = rows
    said = {}
    for kind, given in (("file", {"representations": str(path)}), ("mean", {})):
        call(
            eval_program.evaluate, model_dir, MIXTURE_OR_TASK_NAME="toy_unseen", examples=6,
            unseen="mean", **given,
        )  # fmt: skip
        lines = model_dir / "eval" / "toy_unseen_test" / "predictions.jsonl"
        wanted = [json.loads(line) for line in lines.read_text().splitlines()]
        # The task is not in the training mixture, only in the file.
        mixture = {} if given else {"MIXTURE_OR_TASK_NAME": "toy_unseen"}
        output = tmp_path / f"{kind}.jsonl"
        text = "".join(line["input"] + "\n" for line in wanted)
        monkeypatch.setattr("sys.stdin", stdin(text.encode()))
        call(infer.infer, model_dir, task="toy_reverse", output=str(output), **given, **mixture)
        found = [json.loads(line) for line in output.read_text().splitlines()]
        assert found == [
            {
                "inputs": {"inputs_pretokenized": line["input"]},
                "line": number,
                **{key: line[key] for key in ("prediction", "route")},
            }
            for number, line in enumerate(wanted, 1)
        ]
        vector = row if given else np.asarray(params["representations"]).mean(0)
        route = np.asarray(routes_of(model, {**params, "representations": vector[None]}, 3))[0]
        assert found[0]["route"] == np.argmax(route, -1).tolist()
        said[kind] = [line["prediction"] for line in found]
    assert said["file"] != said["mean"]


def test_equal_lines_have_samples_of_their_own(dense, tmp_path, monkeypatch):
    """Also those at the same place in different batches."""
    given = {
        "MODEL_DIR": str(dense), "infer.task": "toy_copy", "infer.output": str(tmp_path / "out"),
        "RunConfig.eval_batch_rows": 4, "DecodingConfig.sample": True,
    }  # fmt: skip
    monkeypatch.setattr("sys.stdin", stdin(b"a b c\n" * 16))
    gin_files.parse([], [f"{k} = {v!r}" for k, v in given.items()], [], from_model_dir=True)
    infer.infer(build(Config), build(infer.InferConfig))
    found = [line["prediction"] for line in files.read_jsonl(tmp_path / "out")]
    assert len(set(found)) > 12


@pytest.mark.parametrize("unseen", ["nearest", "description", "weighted", "input"])
def test_an_unseen_task_takes_routes_of_tasks_that_it_resembles(
    unseen, routed, tmp_path, monkeypatch, capsys
):
    """`eval` finds what the model was trained on, whatever it scores; `infer` answers the same."""
    model_dir, model, params = routed
    given = {"MIXTURE_OR_TASK_NAME": "toy_unseen", "unseen": unseen}
    call(eval_program.evaluate, model_dir, examples=6, **given)
    lines = model_dir / "eval" / "toy_unseen_test" / "predictions.jsonl"
    wanted = [json.loads(line) for line in lines.read_text().splitlines()]
    known = np.argmax(routes_of(model, params, 3), -1).tolist()
    for line in wanted:
        assert unseen == "weighted" or line["route"] in known
    (score, *_) = files.read_jsonl(model_dir / "eval" / "toy_unseen_test" / "scores.jsonl")
    same = all(line["route"] == wanted[0]["route"] for line in wanted)
    assert score["experts"] == (wanted[0]["route"] if same else None)
    if unseen == "description":
        assert same and wanted[0]["route"] == known[TASKS.index("toy_copy")]
        said = "toy_reverse takes the route of toy_copy, whose description is most similar"
        assert said in capsys.readouterr().err
    elif unseen != "input":
        assert same
        return
    text = "".join(line["input"] + "\n" for line in wanted)
    monkeypatch.setattr("sys.stdin", stdin(text.encode()))
    output = tmp_path / "answers.jsonl"
    call(infer.infer, model_dir, task="toy_reverse", output=str(output), **given)
    found = [json.loads(line) for line in output.read_text().splitlines()]
    for line, answer in zip(wanted, found, strict=True):
        assert answer["route"] == line["route"] and answer["prediction"] == line["prediction"]
    call(infer.infer, model_dir, split="test", output=str(tmp_path), **given)
    path = tmp_path / "toy_reverse-predict.jsonl-00000-of-00001"
    by_input = {a["inputs"]["inputs_pretokenized"]: a["prediction"] for a in files.read_jsonl(path)}
    for line in wanted:
        assert by_input[line["input"]] == line["prediction"]


def test_lines_of_an_unseen_task_are_routed_by_its_description(tmp_path, monkeypatch, capsys):
    """Not by the mean."""
    model_dir = tmp_path / "run"
    model, params = write_run(model_dir, experts=2, apart=True)
    monkeypatch.setattr("sys.stdin", stdin(b"red blue\n"))
    call(
        infer.infer, model_dir, task="toy_reverse", unseen="description",
        MIXTURE_OR_TASK_NAME="toy_unseen",
    )  # fmt: skip
    route = np.argmax(routes_of(model, params, 3)[TASKS.index("toy_copy")], -1).tolist()
    assert json.loads(capsys.readouterr().out)["route"] == route


def test_a_task_that_is_only_described(routed, monkeypatch, capsys):
    """It is answered as the training task that is described alike."""
    model_dir = routed[0]

    def answers(**given):
        monkeypatch.setattr("sys.stdin", stdin(b"red blue\n7 5\n"))
        call(infer.infer, model_dir, **given)
        return capsys.readouterr()

    for text, task in (("What if I add both numbers?", "toy_sum"), ("Say the words.", "toy_copy")):
        said = answers(description=text)
        assert said.out == answers(task=task).out
        assert f"answers by the route of {task}, whose description is most similar" in said.err
    with pytest.raises(UserError, match="'Translate!' shares no word with that of a training task"):
        answers(description="Translate!")
    for other in ({"task": "toy_sum"}, {"split": "test"}, {"representations": "rows.json"}):
        with pytest.raises(UserError, match="describes lines: give it alone"):
            answers(description="Add.", **other)


def test_experts_are_disabled_on_request(routed, dense):
    model_dir = routed[0]
    given = {"MIXTURE_OR_TASK_NAME": "toy_unseen", "examples": 1, "disable_examples": 2}
    call(eval_program.evaluate, model_dir, **given)
    found = json.loads((model_dir / "eval" / "toy_unseen_test" / "disabling.json").read_text())
    (task,) = found["tasks"].values()
    assert task["examples"] == 2
    assert np.shape(task["without"]) == (len(found["layers"]), found["experts"])
    with pytest.raises(UserError, match="a dense model: it has no experts to switch off"):
        call(eval_program.evaluate, dense, **given)
    del given["disable_examples"]
    place = model_dir / "eval" / "toy_unseen_test"
    ((first, last),) = (row["route"] for row in files.read_jsonl(place / "predictions.jsonl"))
    call(eval_program.evaluate, model_dir, without=(f"decoder.0.{last}",), **given)
    place = place.with_name(f"toy_unseen_test_without_decoder.0.{last}")
    (row,) = files.read_jsonl(place / "predictions.jsonl")
    assert row["route"] == [first, 1 - last]  # of two experts
    assert files.read_json(place / "without.json") == [f"decoder.0.{last}"]
    given["disable_examples"] = 2
    with pytest.raises(UserError, match=r"with eval\.unseen 'input' a task has no router's"):
        call(eval_program.evaluate, model_dir, unseen="input", **given)


def test_a_dense_model_has_no_routes(dense, rows, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", stdin(b"red blue\n"))
    call(infer.infer, dense, task="toy_reverse", representations=str(rows[0]))
    unseen = json.loads(capsys.readouterr().out)
    monkeypatch.setattr("sys.stdin", stdin(b"red blue\n"))
    call(infer.infer, dense, task="toy_copy")
    assert json.loads(capsys.readouterr().out) == unseen
    assert unseen["inputs"] == {"inputs_pretokenized": "red blue"} and unseen["route"] is None


@pytest.mark.parametrize("model_dir", ["routed", "dense"])
def test_representations_of_a_task_that_was_trained_on_are_refused(model_dir, rows, request):
    model_dir = request.getfixturevalue(model_dir)
    model_dir = model_dir[0] if isinstance(model_dir, tuple) else model_dir
    file = {"representations": str(rows[0])}
    why = r"rows\.json: representations are for tasks that .* it was trained on "
    for settings in ({}, {"MIXTURE_OR_TASK_NAME": "toy_train", "split": "test"}):
        with pytest.raises(UserError, match=why + "toy_copy$"):
            call(infer.infer, model_dir, task="toy_copy", **settings, **file)
    with pytest.raises(UserError, match=why + "all 2 tasks$"):
        call(eval_program.evaluate, model_dir, MIXTURE_OR_TASK_NAME="toy_train", **file)


@pytest.mark.parametrize("model_dir", ["routed", "dense"])
def test_a_misspelt_task_is_refused_with_the_nearest(model_dir, rows, request):
    model_dir = request.getfixturevalue(model_dir)
    model_dir = model_dir[0] if isinstance(model_dir, tuple) else model_dir
    with pytest.raises(UserError, match=r"no 'toy_copi'; .* infer\.rep.*; did you mean 'toy_copy'"):
        call(infer.infer, model_dir, task="toy_copi")
    with pytest.raises(UserError, match=r"has no task 'toy_revers'; did you mean 'toy_reverse'"):
        call(infer.infer, model_dir, task="toy_revers", representations=str(rows[0]))
    # The task exists, but not in the mixture.
    with pytest.raises(UserError, match="no 'toy_reverse'"):
        call(infer.infer, model_dir, task="toy_reverse")


def test_the_directory_of_checkpoints_stands_for_the_run(dense):
    call(eval_program.evaluate, dense / "checkpoints", MIXTURE_OR_TASK_NAME="toy_train", examples=2)
    assert (dense / "eval" / "toy_train_test").is_dir()
    assert not list((dense / "eval").glob("step_*"))


def test_a_line_ends_at_a_line_feed(dense, monkeypatch, capsys):
    """Not at a carriage return, a form feed or a separator of Unicode; answers are numbered."""
    lines = ["one\rtwo", "\x0bthree\x0c", "four\u2028five\x85", "", "six"]
    monkeypatch.setattr("sys.stdin", stdin("\n".join(lines).encode() + b"\r\n"))
    call(infer.infer, dense, task="toy_copy")
    found = [json.loads(line) for line in capsys.readouterr().out.split("\n")[:-1]]
    assert [row["inputs"]["inputs_pretokenized"] for row in found] == lines
    assert [row["line"] for row in found] == [1, 2, 3, 4, 5]


def test_a_byte_order_mark_is_no_input(dense, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", stdin(b"\xef\xbb\xbfred\r\n\xef\xbb\xbfblue\n"))
    call(infer.infer, dense, task="toy_copy")
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    texts = [row["inputs"]["inputs_pretokenized"] for row in found]
    assert texts == ["red", "\ufeffblue"]  # only the first one is the file's


def test_lines_that_are_cut_are_said(dense, monkeypatch, capsys, tmp_path):
    """As many tokens as a row has, with the end of sequence, are not."""
    vocabulary, limit = toy_mixtures()[0].vocabulary, SETTINGS["TASK_FEATURE_LENGTHS"]["inputs"]
    word = next(w for w in "abcdefg" if len(vocabulary.encode(" ".join([w] * 9))) == 9)
    full, longer = (" ".join([word] * n) for n in (limit - 1, limit))
    assert len(vocabulary.encode(full)) + 1 == limit
    for texts, said in {
        (full, "red"): "",
        ("red", longer): f"TASK_FEATURE_LENGTHS cuts inputs after {limit} tokens: line 2\n",
        ("red", longer, full, longer, *["red"] * 5, longer): "tokens: line 2, and 2 more\n",
    }.items():
        monkeypatch.setattr("sys.stdin", stdin("\n".join(texts).encode()))
        call(infer.infer, dense, task="toy_copy")
        err = capsys.readouterr().err
        assert err.endswith(said) and ("cuts" in err) == bool(said)


def test_a_directory_for_answers_is_refused_before_the_work(dense, capsys, tmp_path):
    with pytest.raises(UserError, match="is a directory; answers to lines are a file"):
        call(infer.infer, dense, task="toy_copy", output=str(tmp_path))
    assert not capsys.readouterr().err  # no checkpoint was read


def test_a_file_for_the_answers_to_a_split_is_refused_before_the_work(dense, capsys, tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(UserError, match="is a file; answers to a split are files in a directory"):
        call(infer.infer, dense, split="test", output=str(tmp_path / "out"))
    assert not capsys.readouterr().err


def test_what_was_written_is_said(dense, capsys, tmp_path):
    (tmp_path / "in.txt").write_text("red\n")
    out = tmp_path / "out.jsonl"
    call(infer.infer, dense, task="toy_copy", input=str(tmp_path / "in.txt"), output=str(out))
    assert capsys.readouterr().err.endswith(f"wrote {out}\n") and out.exists()


def test_a_line_that_is_no_text_ends_the_answers_there(dense, monkeypatch, capsys, tmp_path):
    data = b"red\nblue\n\xff\xfe\nred\n"
    monkeypatch.setattr("sys.stdin", stdin(data))
    with pytest.raises(UserError, match=r"^-:3: the line is not UTF-8$"):
        call(infer.infer, dense, task="toy_copy")
    assert len(capsys.readouterr().out.splitlines()) == 2  # those before it are answered
    (tmp_path / "in.txt").write_bytes(data)
    with pytest.raises(UserError, match=r"in\.txt:3: the line is not UTF-8$"):
        call(infer.infer, dense, task="toy_copy", input=str(tmp_path / "in.txt"))
    assert not capsys.readouterr().out


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A run that carries its vocabulary."""
    model_dir = tmp_path_factory.mktemp("own") / "run"
    write_run(model_dir, experts=1)
    directory.copy_vocabulary(model_dir, toy_mixtures()[0].vocabulary_dir)
    return model_dir


def test_answers_need_no_training_data(own, monkeypatch, capsys, tmp_path):
    """Neither the task module nor the cache."""
    said = []
    for settings in ({}, {"TASK_MODULES": ("gone.py",), "CACHE_DIR": str(tmp_path / "nowhere")}):
        monkeypatch.setattr("sys.stdin", stdin(b"copy: red blue\n"))
        call(infer.infer, own, task="toy_copy", **settings)
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and json.loads(said[0])["prediction"]
    assert not (tmp_path / "nowhere").exists()


def test_answers_do_not_need_the_model_that_the_vocabulary_came_from(own, monkeypatch, capsys):
    gone = {"VocabularyConfig.path": "gone.model"}
    lines = [f"{k} = {v!r}" for k, v in ({"MODEL_DIR": str(own)} | gone).items()]
    gin_files.parse([], [*lines, "infer.task = 'toy_copy'"], [], from_model_dir=True)
    monkeypatch.setattr("sys.stdin", stdin(b"copy: red blue\n"))
    infer.infer(build(Config), build(infer.InferConfig))
    assert json.loads(capsys.readouterr().out)["prediction"]


def test_a_run_keeps_its_vocabulary_when_its_data_change(own, tmp_path):
    """As if the text that trains the vocabulary had changed: of the same size, with other ids."""
    predictions = []
    for vocabulary, cache_dir in (("toy_train", toy_cache()), ("toy_unseen", tmp_path / "cache")):
        lines = [f"MODEL_DIR = {str(own)!r}", f"CACHE_DIR = {str(cache_dir)!r}",
                 "eval.examples = 4", f"VocabularyConfig.trained_on = {vocabulary!r}",
                 f"TASK_MODULES = {MODULE!r}"]  # fmt: skip
        gin_files.parse([], lines, [], from_model_dir=True)
        eval_program.evaluate(build(Config), build(eval_program.EvalConfig))
        path = own / "eval" / "toy_train_test" / "predictions.jsonl"
        predictions.append(path.read_text())
    assert predictions[0] == predictions[1]
    (used,) = {path.parent.name for path in (tmp_path / "cache").glob("vocabularies/*/*.json")}
    files_of = [d / "sentencepiece.model" for d in (own / "vocabulary",
                tmp_path / "cache" / "vocabularies" / used)]  # fmt: skip
    assert files_of[0].read_bytes() == files_of[1].read_bytes()


def test_answers_are_kept_where_a_metric_fails_on_them(own, monkeypatch):
    apply, failing = evaluator.apply_functions, "toy_sum"

    def fails(task, *arguments):
        if task.name == failing:
            raise UserError(f"task {task.name!r}: metric f fails")
        return apply(task, *arguments)

    monkeypatch.setattr(evaluator, "apply_functions", fails)
    lines = [f"MODEL_DIR = {str(own)!r}", "eval.examples = 4", f"TASK_MODULES = {MODULE!r}",
             f"CACHE_DIR = {str(toy_cache())!r}"]  # fmt: skip
    gin_files.parse([], lines, [], from_model_dir=True)
    place = own / "eval" / "toy_train_test"
    (place / "scores.jsonl").parent.mkdir(parents=True, exist_ok=True)
    (place / "scores.jsonl").write_text("")  # of an evaluation before
    with pytest.raises(UserError, match=r"metric f fails; the answers so far are in .*predictions"):
        eval_program.evaluate(build(Config), build(eval_program.EvalConfig))
    found = [*files.read_jsonl(place / "predictions.jsonl")]
    assert len({line["task"] for line in found}) > 1 and found[-1]["task"] == failing
    assert all(type(line["prediction"]) is str for line in found)
    assert not (place / "scores.jsonl").exists()
