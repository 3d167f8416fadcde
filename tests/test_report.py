"""The whole report: from artificial run directories to the page and numbers."""

import base64
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from report_runs import (
    COMMIT,
    DATE,
    drawings,
    make_disabling,
    make_finetune,
    make_run,
    ontology,
    read_page,
)

from moe_jax.core import files
from moe_jax.core.errors import UserError
from moe_jax.report import figures
from moe_jax.report.build import report

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(("tasks", "layers", "experts", "seeds"), [(12, 4, 3, 1), (160, 24, 4, 3)])
def test_whole_report(tmp_path, tasks, layers, experts, seeds):
    places = ontology(tasks)
    runs = {
        "dense": make_run(tmp_path / "dense", places, experts=0, level=0.4),
        "moe": make_run(tmp_path / "moe", places, layers, experts, seed=1, level=0.6),
    }
    make_disabling(runs["moe"])
    finetune = make_finetune(tmp_path / "finetune", 4, seeds)
    made = report(tmp_path / "report", runs, finetune, permutations=50)
    page = read_page(made.page)
    for name in (
        "summary",
        "scores",
        "adaptation",
        "transfer",
        "routes",
        "evolution",
        "similarity",
        "agreement",
        "experts",
        "disabling",
        "decided",
        "training",
        "tasks",
        "runs",
    ):
        assert name in page.ids
    for task in places:
        assert task in page.text
    assert all(sentence in page.text for sentence in made.findings)
    assert "unseen_3" in next(s for s in made.findings if s.startswith("No relative gain"))
    assert page.rows > 2 * tasks
    assert DATE in page.text and COMMIT in page.text
    assert made.page.stat().st_size < 5_000_000
    assert {p.name for p in made.page.parent.iterdir()} == {"index.html", "report.json"}

    numbers = json.loads((tmp_path / "report" / "report.json").read_text())
    routes = drawings(made.page.read_text())["routes"]
    assert [frame["label"] for frame in routes["frames"]][-1] == "step 1,000"
    assert len(routes["rows"]) == tasks and len(routes["columns"]) == layers * experts
    assert numbers["runs"]["moe"]["commit"] == COMMIT
    assert numbers["runs"].keys() == {"dense", "moe", "few-shot adaptation"}
    assert numbers["findings"] == made.findings and numbers["summary"] == made.summary
    assert {*made.summary} < {*made.findings} and len(made.summary) < 10
    for said in ("Mean score on", "ARG of mixture of experts over direct", "Clusters of routes"):
        assert any(s.startswith(said) for s in made.summary)
    assert numbers["agreement"]["categories"]["ami"]["value"] > 0.8
    *_, last = numbers["evolution"].values()
    for name in ("ami", "neighbour_accuracy"):
        for level, measures in numbers["agreement"].items():
            assert last[f"{name}_{level}"] == measures[name]["value"]
        measure = numbers["agreement"]["categories"][name]
        for control in ("shuffled labels", "random routes"):
            assert measure[control]["mean"] < measure["value"] - 0.4
            assert measure[control]["p_value"] == pytest.approx(1 / (1 + measure[control]["draws"]))
    # Of 12 tasks, 3 in a category, the 220 ways to choose them leave Holm's correction no room.
    assert bool(numbers["experts"]["significant"]) == (tasks == 160)
    assert "extractiveness" in numbers["experts"]["properties"]
    lines = list(files.read_jsonl(runs["moe"] / "eval/test/scores.jsonl"))
    mean = numbers["scores"]["test"]["mean"]["moe"]
    assert mean == pytest.approx(np.mean([line["score"] for line in lines]))
    mixture = numbers["adaptation"]["starts"]["mixture of experts"]
    assert mixture["no_relative_gain"] == ["unseen_3"]
    assert (mixture["ci95"] is None) == (seeds == 1)
    over_dense = numbers["adaptation"]["over_dense"]["arms"]["mixture of experts"]["difference"]
    start = f"Few-shot, mixture of experts minus dense: {over_dense['value']:+.3f} ("
    assert any(sentence.startswith(start) for sentence in made.summary)
    assert "untrained" not in page.text
    # A bar reaches from the lowest to the highest seed, and so is within the scores.
    rows = [row for row in files.read_jsonl(finetune / "runs.jsonl") if row["task"] == "unseen_0"]
    for series, start in zip(
        drawings(made.page.read_text())["few-shot scores"]["series"],
        ("untrained", "dense", "moe"), strict=True,
    ):  # fmt: skip
        of_start = [row["test_score"] for row in rows if row["start"] == start]
        scores = [max(pair) for pair in zip(of_start[::2], of_start[1::2], strict=True)]  # on dev
        ends = (None, None) if seeds == 1 else (min(scores), max(scores))
        assert (series["low"][0], series["high"][0]) == ends


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

    only_routes = report(
        tmp_path / "b", {"r": tmp_path / "routes"}, tmp_path / "empty", permutations=20
    )
    page = read_page(only_routes.page)
    assert "No eval/*/scores.jsonl, left out here: r." in page.text
    assert f"{tmp_path / 'empty'} has no runs.jsonl, so there are no relative gains" in page.text
    assert not any("score" in sentence.lower() for sentence in only_routes.findings)

    rows = list(files.read_jsonl(make_finetune(tmp_path / "f", 2) / "runs.jsonl"))
    files.write_jsonl(tmp_path / "f" / "runs.jsonl", rows[:-4])
    page = read_page(report(tmp_path / "c", {}, tmp_path / "f").page)
    assert (
        "Relative gains are left out: task 'unseen_1', start 'mixture of experts' lacks seed 1, 2."
        in page.text
    )


def test_disabling_stands_beside_the_correlation(tmp_path):
    run = make_run(tmp_path / "run", ontology(24))
    make_disabling(run)
    made = report(tmp_path / "report", {"run": run}, permutations=10)
    numbers = files.read_json(tmp_path / "report" / "report.json")
    found = numbers["disabling"]["test"]["category"]
    assert len(found["rows"]) == 4 * 12
    risen = [row for row in found["rows"] if row["rise"] > 1e-9]
    assert [(row["expert"], row["category"]) for row in risen] == [
        ("encoder.0 expert 0", "extractive")
    ]
    assert risen[0]["rise"] == pytest.approx(1) and risen[0]["rise_elsewhere"] == 0
    names = numbers["experts"]["properties"]
    r = numbers["experts"]["r"][0][0][names.index("extractive")]
    assert risen[0]["r"] == pytest.approx(r)
    drawn = drawings(made.page.read_text())["disabling test category"]
    assert (drawn["low"], drawn["high"]) == (-1, 1)

    # Planted skills are subcategories: of 12, three are extractive.
    by_skill = numbers["disabling"]["test"]["subcategory"]
    assert len(by_skill["rows"]) == 12 * 12 and len(by_skill["most_tied"]) == 12
    for row in by_skill["rows"]:
        rises = row["expert"] == "encoder.0 expert 0" and row["subcategory"].startswith("extra")
        assert row["rise"] == pytest.approx(float(rises))
        if rises:  # of the 22 other tasks, 4 are extractive too
            assert row["rise_elsewhere"] == pytest.approx(4 / 22)
    for row in by_skill["most_tied"]:
        same = [r["r"] for r in by_skill["rows"] if r["subcategory"] == row["subcategory"]]
        assert row["r"] == max(same)
        if row["rise_elsewhere"] > 0:
            assert row["ratio"] == pytest.approx(row["rise"] / row["rise_elsewhere"])


def test_how_many_subcategories_need_the_expert_that_is_most_tied_to_them(tmp_path):
    run, needing = make_run(tmp_path / "run", ontology(24)), 0
    for expert in range(3):
        make_disabling(run, "extractive", expert)
        made = report(tmp_path / "report", {"run": run}, permutations=2)
        numbers = files.read_json(tmp_path / "report" / "report.json")["disabling"]["test"]
        tied = numbers["subcategory"]["most_tied"]
        planted = [r for r in tied if r["expert"] == f"encoder.0 expert {expert}"]
        count = sum(r["subcategory"].startswith("extractive") for r in planted)
        said = f"the loss of {count} of 12 subcategories rises at least twice as much"
        assert any(said in sentence for sentence in made.summary)
        needing += count
    assert needing


def test_subcategories_of_one_name_in_two_categories_are_two(tmp_path):
    places = ontology(24)
    for t, (task, (category, _)) in enumerate(places.items()):
        places[task] = (category, f"kind {t // 4 % 3}")
    run = make_run(tmp_path / "run", places)
    make_disabling(run)
    report(tmp_path / "report", {"run": run}, permutations=5)
    numbers = files.read_json(tmp_path / "report" / "report.json")
    found = numbers["disabling"]["test"]["subcategory"]["rows"]
    assert len({row["subcategory"] for row in found}) == 12
    assert numbers["agreement"]["subcategories"]["classes"] == 12
    risen = {row["subcategory"] for row in found if row["rise"] > 1e-9}
    assert risen == {f"extractive / kind {i}" for i in range(3)}


def test_tasks_that_lose_against_training_alone_are_named(tmp_path):
    places = ontology(6)
    run = make_run(tmp_path / "run", places)
    shared = {x["task"]: x for x in files.read_jsonl(run / "eval" / "test" / "scores.jsonl")}
    lower, higher = list(places)[:2]
    for task, change in ((lower, 0.2), (higher, -0.2)):
        line = shared[task] | {"score": shared[task]["score"] + change}
        path = tmp_path / "single" / task / "eval" / f"{task}_test" / "scores.jsonl"
        files.write_jsonl(path, [line])
    made = report(tmp_path / "report", {"run": run}, single=tmp_path / "single", permutations=10)
    found = files.read_json(tmp_path / "report" / "report.json")["transfer"]["test"]["run"]
    assert found["losing"] == [lower] and found["tasks"] == 2
    assert found["mean_difference"] == pytest.approx(0)
    assert "1 of 2 tasks lose" in " ".join(made.summary)
    with pytest.raises(UserError, match="has no runs of single tasks"):
        report(tmp_path / "report", {"run": run}, single=tmp_path / "absent")


def test_few_shot_tasks_that_lose_need_an_interval(tmp_path):
    """`moe` is made 0.2 worse than direct fine-tuning on one task, and is better on the others."""
    made = make_finetune(tmp_path / "f", 3)
    rows = list(files.read_jsonl(made / "runs.jsonl"))
    for row in rows:
        if row["start"] == "moe" and row["task"] == "unseen_0":
            row["test_score"] -= 0.3
    files.write_jsonl(made / "runs.jsonl", rows)
    findings = report(tmp_path / "report", {}, made).findings
    found = files.read_json(tmp_path / "report" / "report.json")["transfer"]["few-shot"]
    assert found["mixture of experts"] == {"losing": ["unseen_0"], "clearly": ["unseen_0"]}
    sentence = "Few-shot, mixture of experts scores lower than direct fine-tuning on 1 of 3 unseen"
    assert any(finding.startswith(sentence) for finding in findings)
    assert found["dense"]["clearly"] == []


def bold(text: str) -> list[str]:
    return re.findall(r'<td class="number best"[^>]*>([^<]*)</td>', text)


def test_a_number_is_bold_only_if_the_interval_excludes_0(tmp_path):
    """Twelve tasks: always 0.1 better; or as often better as worse."""
    places = ontology(12)
    for name, scores in (
        ("a", [0.5] * 12), ("b", [0.6] * 12), ("c", [0.5, 0.7] * 6),
    ):  # fmt: skip
        lines = [
            {"task": task, "split": "test", "metric": "EM", "score": score, "category": "x"}
            for task, score in zip(places, scores, strict=True)
        ]
        files.write_jsonl(tmp_path / name / "eval" / "test" / "scores.jsonl", lines)
    made = report(tmp_path / "ab", {"a": tmp_path / "a", "b": tmp_path / "b"})
    assert bold(made.page.read_text()) == ["0.600", "0.600"]  # all tasks, category x
    made = report(tmp_path / "bc", {"b": tmp_path / "b", "c": tmp_path / "c"})
    assert bold(made.page.read_text()) == []


def test_packed_values_are_read_back():
    values = np.array([-1, -0.25, 0, 0.123456, 1, np.nan])
    whole = np.frombuffer(base64.b64decode(figures.packed(values, -1, 1)), "<u2")
    back = np.where(whole == 65535, np.nan, -1 + 2 * whole.astype(float) / 65534)
    np.testing.assert_allclose(back, values, atol=2e-5)


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


def test_disabling_without_categories_says_so(tmp_path):
    run = make_run(tmp_path / "run", ontology(12))
    make_disabling(run)
    value = files.read_json(run / "eval" / "test" / "disabling.json")
    for row in value["tasks"].values():
        row |= {"category": "", "subcategory": ""}
    files.write_json(run / "eval" / "test" / "disabling.json", value)
    made = report(tmp_path / "report", {"run": run})
    assert "Its tasks have no category" in made.page.read_text()


def test_too_few_tasks_for_an_agreement_are_said(tmp_path):
    """Of 3 tasks in 2 subcategories, a third of all shuffles agree as well as can be."""
    places = {"a": ("words", "x"), "b": ("words", "x"), "c": ("words", "y")}
    made = report(tmp_path / "report", {"run": make_run(tmp_path / "run", places)})
    assert "Subcategories are left out: 3 tasks in 2 of them are too few: 33 % of shuffles" in (
        made.page.read_text()
    )
    assert not any("agree with the" in finding for finding in made.findings)
    assert files.read_json(tmp_path / "report" / "report.json")["agreement"] == {}


def test_routes_that_share_no_expert_form_no_clusters(tmp_path):
    """Each subcategory has an expert of its own, so categories are no cut of the tree."""
    places = ontology(24, categories=4, subcategories=3)
    run = make_run(tmp_path / "run", places, experts=12)
    value, kinds = files.read_json(run / "routes.json"), sorted(set(places.values()))
    for task, place in places.items():
        value["tasks"][task]["route"] = np.eye(12)[[kinds.index(place)] * 4].tolist()
    files.write_json(run / "routes.json", value)
    made = report(tmp_path / "report", {"run": run})
    clusters = files.read_json(made.page.with_name("report.json"))["similarity"]["clusters"]
    assert len(clusters) == 12 and all(len({places[t] for t in c}) == 1 for c in clusters)
    text = " ".join(made.findings)
    assert (
        "Routes form no clusters that the 4 human categories could be compared with, since their"
        " distances tie; the task with the most similar route is of the same one for 100 % of tasks"
    ) in text
    assert "agree with the 12 human subcategories more than chance would" in text


def test_tasks_without_ontology_and_one_expert(tmp_path):
    run = make_run(tmp_path / "run", {f"t{i}": (None, None) for i in range(5)}, 2, 1)
    made = report(tmp_path / "report", {"run": run})
    page = read_page(made.page)
    assert "nothing to decide" in page.text
    assert "(no category)" in page.text
    assert "every expert's weight is the same for all tasks" in " ".join(made.findings)


def test_tasks_without_ontology_and_several_experts(tmp_path):
    run = make_run(tmp_path / "run", {f"t{i}": (None, None) for i in range(5)}, 2, 3)
    findings = " ".join(report(tmp_path / "report", {"run": run}).findings)
    assert "the ontology cannot be measured: no task has a category" in findings


def test_which_run_the_page_is_about(tmp_path):
    places = ontology(6)
    runs = {
        "stage1": make_run(tmp_path / "stage1", places, 2, 2),
        "moe": make_run(tmp_path / "moe", places, 2, 2),
        "dense": make_run(tmp_path / "dense", places, 2, 1),
    }
    for asked, used in ((None, "moe"), ("stage1", "stage1"), ("dense", "dense")):
        report(tmp_path / "report", runs, model=asked, permutations=5)
        assert files.read_json(tmp_path / "report" / "report.json")["routes"]["run"] == used
    with pytest.raises(UserError, match="no run is named 'stage'; did you mean 'stage1'"):
        report(tmp_path / "report", runs, model="stage")


def test_hostile_names_are_escaped(tmp_path):
    places = {f"<b>t{i}</b>": ("<script>alert(1)</script> $x_1$", "\"&'") for i in range(4)}
    places |= {f"任务{i}": ("other", "s") for i in range(4)}
    made = report(tmp_path / "report", {"run": make_run(tmp_path / "run", places, 2, 2)})
    text = made.page.read_text(encoding="utf-8")
    assert "<script>alert" not in text and "<b>" not in text
    assert "<b>t0</b>" in read_page(made.page).text


def test_scores_of_different_tasks_are_compared_on_the_common_ones(tmp_path):
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


def test_command_line(tmp_path):
    run = make_run(tmp_path / "run", ontology(6), 2, 2)
    arguments = ["--run", f"moe={run}", "--output", tmp_path / "out", "--permutations", "9"]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "moe_jax.report", *arguments],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"report: {tmp_path / 'out' / 'index.html'}"
    assert "Mean score on “test”" in done.stdout
    read_page(tmp_path / "out" / "index.html")
