"""The whole report: from artificial run directories to the page, PNGs and numbers."""

import html.parser
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from moe_jax.core import files
from moe_jax.core.errors import UserError
from moe_jax.report import plots
from moe_jax.report.__main__ import main
from moe_jax.report.build import report

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("copy_span", "topic_of_news", "capital_of", "reorder_words", "is_entailed", "fill")


def ontology(tasks: int, categories: int = 4, subcategories: int = 3) -> dict[str, tuple]:
    """{task: (category, subcategory)}, categories of equal size."""
    result = {}
    for t in range(tasks):
        category = ("classification", "extractive", "generation", "world knowledge")[t % categories]
        sub = f"{category[:5]} kind {t // categories % subcategories}"
        result[f"{NAMES[t % len(NAMES)]}_{t}"] = (category, sub)
    return result


def make_run(
    path: Path,
    places: dict[str, tuple],
    layers: int = 4,
    experts: int = 3,
    planted: float = 3.0,
    seed: int = 0,
    level: float = 0.5,
) -> Path:
    """Writes a run whose routes follow the category with strength `planted`; E=0: no routes."""
    rng = np.random.default_rng(seed)
    steps = range(10, 1001, 10)
    lines = [
        {"step": s, "kind": "train", "loss": 3 * np.exp(-s / 300) + rng.uniform(0.5, 0.8)}
        for s in steps
    ]
    lines += [{"step": s, "kind": "eval", "mean_score": s / 2000} for s in steps if s % 200 == 0]
    files.write_jsonl(path / "metrics.jsonl", lines)
    if experts:
        preferred = {c: rng.normal(size=(layers, experts)) for c in dict(places.values())}
        routes = {}
        for task, (category, sub) in places.items():
            logits = planted * preferred[category] + rng.normal(size=(layers, experts))
            route = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
            routes[task] = {"route": route.tolist(), "category": category, "subcategory": sub}
        half = layers // 2
        names = [f"encoder.{i}" for i in range(half)]
        names += [f"decoder.{i}" for i in range(layers - half)]
        value = {"step": 1000, "experts": experts, "layers": names, "tasks": routes}
        files.write_json(path / "routes.json", value)
    for split in ("test", "validation"):
        files.write_jsonl(
            path / "eval" / split / "scores.jsonl",
            [
                {
                    "task": task,
                    "split": split,
                    "metric": "accuracy",
                    "examples": 100,
                    "score": float(np.clip(level + rng.normal(0, 0.2), 0, 1)),
                    "category": category,
                    "subcategory": sub,
                    "experts": [0] * layers,
                }
                for task, (category, sub) in places.items()
            ],
        )
    return path


def make_finetune(path: Path, tasks: int, seeds: int = 3, starts=("untrained", "dense", "moe")):
    """Writes runs.jsonl; direct fine-tuning of the last task scores 0."""
    rng = np.random.default_rng(5)
    rows = []
    for t in range(tasks):
        for i, start in enumerate(starts):
            for seed in range(seeds):
                for rate in (1e-4, 3e-4):
                    score = 0.4 + 0.05 * i + rng.uniform(-0.02, 0.02)
                    score *= not (t == tasks - 1 and start == "untrained")
                    rows.append(
                        {
                            "task": f"unseen_{t}",
                            "metric": "accuracy",
                            "start": start,
                            "seed": seed,
                            "learning_rate": rate,
                            "batch_size": 8,
                            "dev_score": score,
                            "test_score": score,
                        }
                    )
    files.write_jsonl(path / "runs.jsonl", rows)
    return path


class Page(html.parser.HTMLParser):
    """Checks that tags close in order; collects ids, links, images, table heads and text."""

    VOID = ("meta", "img", "br", "link", "input")

    def __init__(self, text: str):
        super().__init__()
        self.open, self.ids, self.references, self.images = [], [], [], []
        self.rows, self.text = 0, ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag not in self.VOID:
            self.open.append(tag)
        if "id" in attributes:
            self.ids.append(attributes["id"])
        self.references += [attributes[k] for k in ("href", "src", "action") if k in attributes]
        if tag == "img":
            assert attributes["alt"]
            self.images.append(attributes)
        self.rows += tag == "tr"

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data + " "


def read_page(path: Path) -> Page:
    text = path.read_text(encoding="utf-8")
    assert not any(mark in text for mark in ("://", 'src="//', "@import", "url("))
    actual = Page(text)
    assert all(r.startswith(("#", "data:image/png;base64,")) for r in actual.references)
    assert all(r[1:] in actual.ids for r in actual.references if r.startswith("#"))
    return actual


@pytest.mark.parametrize(("tasks", "layers", "experts", "seeds"), [(12, 4, 3, 1), (160, 24, 8, 3)])
def test_whole_report(tmp_path, tasks, layers, experts, seeds):
    places = ontology(tasks)
    runs = {
        "dense": make_run(tmp_path / "dense", places, experts=0, level=0.4),
        "moe": make_run(tmp_path / "moe", places, layers, experts, seed=1, level=0.6),
    }
    finetune = make_finetune(tmp_path / "finetune", 4, seeds)
    made = report(tmp_path / "report", runs, finetune, permutations=50)
    page = read_page(made.page)
    for name in (
        "summary",
        "scores",
        "adaptation",
        "routes",
        "similarity",
        "agreement",
        "experts",
        "decided",
        "training",
    ):
        assert name in page.ids
    for task in places:
        assert task in page.text
    assert all(sentence in page.text for sentence in made.findings)
    assert "unseen_3" in next(s for s in made.findings if s.startswith("No relative gain"))
    assert page.rows > 2 * tasks

    numbers = json.loads((tmp_path / "report" / "report.json").read_text())
    assert len(page.images) == len(numbers["figures"]) == 12
    for name in numbers["figures"]:
        data = (tmp_path / "report" / name).read_bytes()
        height, width, _ = matplotlib.image.imread(io.BytesIO(data), format="png").shape
        assert 100 < width < 3000 and 100 < height < 6000
    heatmap = matplotlib.image.imread(tmp_path / "report" / "routes.png")
    assert heatmap.shape[0] > 20 * tasks  # pixels of a row: an 8 point label fits

    assert numbers["findings"] == made.findings
    assert numbers["agreement"]["categories"]["ami"] > 0.8
    assert numbers["agreement"]["categories"]["control_mean"] < 0.2
    assert numbers["experts"]["significant"]
    lines = list(files.read_jsonl(runs["moe"] / "eval/test/scores.jsonl"))
    mean = numbers["scores"]["test"]["mean"]["moe"]
    assert mean == pytest.approx(np.mean([line["score"] for line in lines]))
    assert numbers["adaptation"]["starts"]["moe"]["no_relative_gain"] == ["unseen_3"]
    assert (numbers["adaptation"]["starts"]["moe"]["ci95"] is None) == (seeds == 1)


def test_missing_pieces_are_left_out_with_a_sentence(tmp_path):
    places = ontology(12)
    full = make_run(tmp_path / "full", places)
    (tmp_path / "empty").mkdir()
    (tmp_path / "routes").mkdir()
    (full / "routes.json").rename(tmp_path / "routes" / "routes.json")
    runs = {"full": full, "empty": tmp_path / "empty"}
    page = read_page(report(tmp_path / "a", runs).page)
    assert "No run has a routes.json" in page.text
    assert "No fine-tuning runs were given" in page.text
    assert "No eval/*/scores.jsonl, left out here: empty." in page.text
    assert "No metrics.jsonl, left out here: empty." in page.text

    only_routes = report(tmp_path / "b", {"r": tmp_path / "routes"}, tmp_path / "empty", None, 20)
    page = read_page(only_routes.page)
    assert "No eval/*/scores.jsonl, left out here: r." in page.text
    assert not any("score" in sentence.lower() for sentence in only_routes.findings)

    rows = list(files.read_jsonl(make_finetune(tmp_path / "f", 2) / "runs.jsonl"))
    files.write_jsonl(tmp_path / "f" / "runs.jsonl", rows[:-4])
    page = read_page(report(tmp_path / "c", {}, tmp_path / "f").page)
    assert "Relative gains are left out: task 'unseen_1', start 'moe' lacks seed 1, 2." in page.text


def test_equal_routes_are_reported_honestly(tmp_path):
    run = make_run(tmp_path / "run", ontology(12))
    value = files.read_json(run / "routes.json")
    for task in value["tasks"].values():
        task["route"] = [[0.2, 0.3, 0.5]] * 4
    files.write_json(run / "routes.json", value)
    made = report(tmp_path / "report", {"run": run})
    text = " ".join(made.findings)
    assert "All 12 tasks of “run” take the same route." in text
    assert "cannot be measured: all tasks take the same route" in text
    assert "every expert's weight is the same for all tasks" in text
    assert "no layer's route depends on the task" in text
    numbers = files.read_json(tmp_path / "report" / "report.json")
    assert numbers["routes"]["distinct_routes"] == 1 and numbers["agreement"] == {}
    read_page(made.page)


def test_tasks_without_ontology_and_one_expert(tmp_path):
    run = make_run(tmp_path / "run", {f"t{i}": (None, None) for i in range(5)}, 2, 1)
    made = report(tmp_path / "report", {"run": run})
    page = read_page(made.page)
    assert "nothing to decide" in page.text
    assert "(no category)" in page.text
    assert "no category has 3 tasks inside and 3 outside" in " ".join(made.findings)


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are composed but not rendered, which takes most of a report's time."""
    monkeypatch.setattr(plots, "png", lambda figure: bytes(24))


def test_which_run_s_routes(tmp_path, undrawn):
    places = ontology(6)
    runs = {
        "stage1": make_run(tmp_path / "stage1", places, 2, 2),
        "moe": make_run(tmp_path / "moe", places, 2, 2),
        "dense": make_run(tmp_path / "dense", places, 2, 1),
    }
    for asked, used in ((None, "moe"), ("stage1", "stage1"), ("dense", "dense")):
        report(tmp_path / "report", runs, routes=asked, permutations=5)
        assert files.read_json(tmp_path / "report" / "report.json")["routes"]["run"] == used
    with pytest.raises(UserError, match="no run is named 'stage'; did you mean 'stage1'"):
        report(tmp_path / "report", runs, routes="stage")


def test_hostile_names_are_escaped(tmp_path):
    places = {f"<b>t{i}</b>": ("<script>alert(1)</script> $x_1$", "\"&'") for i in range(4)}
    places |= {f"任务{i}": ("other", "s") for i in range(4)}
    made = report(tmp_path / "report", {"run": make_run(tmp_path / "run", places, 2, 2)})
    text = made.page.read_text(encoding="utf-8")
    assert "<script>alert" not in text and "<b>" not in text
    assert "<b>t0</b>" in read_page(made.page).text


def test_scores_of_different_tasks_are_compared_on_the_common_ones(tmp_path, undrawn):
    for name, tasks in (("a", {"x": 0.2, "y": 0.4, "z": 0.0}), ("b", {"y": 0.5, "z": 0.1})):
        files.write_jsonl(
            tmp_path / name / "eval" / "test" / "scores.jsonl",
            [
                {"task": t, "split": "test", "metric": m, "score": s if m == "EM" else 1.0}
                for t, s in tasks.items()
                for m in ("EM", "F1")
            ],
        )
    made = report(tmp_path / "report", {"a": tmp_path / "a", "b": tmp_path / "b"})
    numbers = files.read_json(tmp_path / "report" / "report.json")["scores"]["test"]
    assert numbers["tasks"] == 2
    assert numbers["mean"] == {"a": pytest.approx(0.2), "b": pytest.approx(0.3)}
    difference = numbers["differences"]["b - a"]
    assert difference["mean"] == pytest.approx(0.1) and difference["better"] == 2
    assert "1 of 3 tasks were not scored by every run" in read_page(made.page).text


def test_the_last_line_of_a_step_counts(tmp_path, undrawn):
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
    ],
)
def test_malformed_files_are_named(tmp_path, name, text, message):
    files.write_text(tmp_path / "run" / name, text)
    with pytest.raises(UserError) as error:
        report(tmp_path / "report", {"run": tmp_path / "run"})
    assert message in str(error.value) and Path(name).name in str(error.value)
    assert not (tmp_path / "report").exists()


def test_command_line(tmp_path):
    run = make_run(tmp_path / "run", ontology(6), 2, 2)

    def command(*arguments):
        return subprocess.run(
            [sys.executable, "-W", "error", "-m", "moe_jax.report", *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, "MPLBACKEND": "Agg"},
        )

    done = command("--run", f"moe={run}", "--output", tmp_path / "out", "--permutations", 9)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"report: {tmp_path / 'out' / 'index.html'}"
    assert "Mean score on “test”" in done.stdout
    read_page(tmp_path / "out" / "index.html")

    absent = command("--run", f"moe={tmp_path / 'absent'}", "--output", tmp_path / "out2")
    assert absent.returncode == 1 and absent.stdout == ""
    assert "Traceback" not in absent.stderr
    assert "absent is not a directory" in absent.stderr.splitlines()[-1]


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
    assert main([*arguments, "--output", "out"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1
    assert message in captured.err
    assert not (tmp_path / "out").exists()
