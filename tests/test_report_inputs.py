"""What a report refuses: files of a run that are not as they should be, and arguments."""

import re
from pathlib import Path

import pytest
from report_runs import make_disabling, make_run, ontology

from moe_jax.core import files
from moe_jax.core.errors import UserError
from moe_jax.report.__main__ import main
from moe_jax.report.build import report


def test_the_last_line_of_a_step_counts(tmp_path):
    lines = [{"step": 2, "kind": "train", "loss": 9.0}, {"step": 1, "kind": "train", "loss": 5.0}]
    lines += [{"step": 2, "kind": "train", "loss": 4.0}]
    files.write_jsonl(tmp_path / "run" / "metrics.jsonl", lines)
    report(tmp_path / "report", {"run": tmp_path / "run"})
    actual = files.read_json(tmp_path / "report" / "report.json")["training"]["run"][
        "training loss"
    ]
    assert (actual["first"], actual["last"], actual["steps"]) == (5, 4, 2)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metrics.jsonl", '{"step": 1}\n{"st', "metrics.jsonl:2: not valid JSON"),
        ("metrics.jsonl", '{"loss": 1}\n', "entry 1 has no integer 'step'"),
        ("eval/test/scores.jsonl", '{"task": "a"}\n', "entry 1 lacks"),
        (
            "eval/test/scores.jsonl",
            '{"task": "a", "metric": "m", "score": NaN}\n',
            "no finite number",
        ),
        ("eval/test/scores.jsonl", '{"task": "a", "metric": "m", "score": null}\n', "not a number"),
        ("routes.json", "{}", "not a file of routes"),
        ("routes.json", '{"step": 1, "experts": 2, "layers": ["e.0"], "tasks": {}}', "no tasks"),
        (
            "routes.json",
            '{"step": 1, "experts": 2, "layers": ["e.0"], "tasks": {"t": {"route": [[1]]}}}',
            "the route of 't' has shape (1, 1), expected (1, 2)",
        ),
        (
            "routes.json",
            '{"step": 1, "experts": 2, "layers": ["e.0"], "tasks": {"t": {"route": [[1, 1]]}}}',
            "is not a distribution",
        ),
        ("origin.json", "[]", "must be {name: value}"),
    ],
)
def test_malformed_files_are_named(tmp_path, name, text, message):
    files.write_text(tmp_path / "run" / name, text)
    with pytest.raises(UserError) as error:
        report(tmp_path / "report", {"run": tmp_path / "run"})
    assert message in str(error.value) and Path(name).name in str(error.value)
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize("wrong", [{"examples": None}, {"category": ["x"]}])
def test_a_file_of_disabling_is_checked(tmp_path, wrong):
    run = make_run(tmp_path / "run", ontology(12))
    make_disabling(run)
    value = files.read_json(run / "eval" / "test" / "disabling.json")
    next(iter(value["tasks"].values())).update(wrong)
    files.write_json(run / "eval" / "test" / "disabling.json", value)
    with pytest.raises(UserError, match=r"disabling\.json: category or examples of"):
        report(tmp_path / "report", {"run": run}, permutations=5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to report"),
        (["--run", "moe"], "expected NAME=DIR"),
        (["--run", "a=.", "--run", "a=."], "'a' is taken"),
        (["--run", "a=empty"], "nothing to report"),
        (["--run", "_a=empty"], "run name '_a'"),
        (["--finetune", "absent"], "absent is not a directory"),
        (["--run", "a=empty", "--permutations", "0"], "expected 1 or more"),
    ],
)
def test_bad_arguments_end_in_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        main([*arguments, "--output", "out"])
    assert "\n" not in str(error.value)
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "out").exists()
