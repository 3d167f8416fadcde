"""The results of an experiment, from the files of its runs, against numbers computed by hand."""

from types import SimpleNamespace

import pytest

from moe_jax.core import files
from moe_jax.experiments.config import ExperimentConfig
from moe_jax.experiments.plan import Plan
from moe_jax.experiments.results import RESULTS, text_tables, write_results
from moe_jax.report import build

ARMS = ("direct", "dense", "routed", "random")
# Test scores of two new tasks by arm and model seed; each has two few-shot samples.
FEW_SHOT = {
    "direct": {1: (0.1, 0.3), 2: (0.1, 0.3)}, "dense": {1: (0.2, 0.6), 2: (0.4, 0.4)},
    "routed": {1: (0.3, 0.6), 2: (0.5, 0.6)}, "random": {1: (0.1, 0.5), 2: (0.3, 0.3)},
}  # fmt: skip


def lines(start, scores):
    """runs.jsonl: the better rate on dev has the score, in the mean over the samples."""
    for task, score in zip(("n1", "n2"), scores, strict=True):
        for sample, shift in ((13, -0.05), (21, 0.05)):
            for rate, dev, test in ((1.0, 0.2, None), (2.0, 0.5, score + shift)):
                yield {
                    "task": task, "metric": "m", "start": start, "seed": sample,
                    "learning_rate": rate, "batch_size": 2, "dev_score": dev, "test_score": test,
                }  # fmt: skip


@pytest.fixture
def plan(tmp_path):
    """A plan of two seeds, all of whose stages are done."""
    plan = object.__new__(Plan)  # without preparing data
    plan.root, plan.arms = tmp_path, ARMS
    plan.settings = ExperimentConfig(arms=ARMS, seeds=(1, 2))
    plan.trained = SimpleNamespace(name="old")
    plan.unseen = SimpleNamespace(name="new")
    for seed in (1, 2):
        place = tmp_path / f"seed_{seed}"
        starts = {"untrained": "direct", "dense": "dense", "moe": "routed"}
        rows = [r for s, arm in starts.items() for r in lines(s, FEW_SHOT[arm][seed])]
        files.write_jsonl(place / "few_shot/runs.jsonl", rows)
        rows = list(lines("moe", FEW_SHOT["random"][seed]))
        files.write_jsonl(place / "random/few_shot/runs.jsonl", rows)
        for i, arm in enumerate(ARMS[1:]):
            for mixture, tasks in (("old", ("t1", "t2", "t3")), ("new", ("n1", "n2"))):
                first = [{"task": t, "metric": "m", "score": 0.1 * (i + seed)} for t in tasks]
                other = [{"task": t, "metric": "other", "score": 9.0} for t in tasks]
                rows = [row | {"split": "test"} for pair in zip(first, other) for row in pair]  # noqa: B905
                files.write_jsonl(place / arm / f"eval/{mixture}_test/scores.jsonl", rows)
    return plan


def test_results_are_those_computed_by_hand(plan, tmp_path):
    result = write_results(plan, (1, 2))
    assert files.read_json(tmp_path / RESULTS)["seeds"] == [1, 2]
    few_shot = result["comparisons"]["few_shot"]
    assert set(few_shot) == {"dense", "random", "direct"}
    # Dense: (0.2 + 0.6 + 0.4 + 0.4) / 4; routed is better by 0.1, 0, 0.1, 0.2.
    assert few_shot["dense"]["score"] == pytest.approx(0.4)
    assert few_shot["dense"]["tasks"] == few_shot["dense"]["seeds"] == 2
    gain = few_shot["dense"]["arms"]["routed"]
    assert gain["difference"]["value"] == pytest.approx(0.1)
    assert gain["relative"]["value"] == pytest.approx(0.25)
    # Over direct fine-tuning, task by task: (0.4 - 0.1) / 0.1 and (0.6 - 0.3) / 0.3.
    assert few_shot["direct"]["arms"]["routed"]["arg"]["value"] == pytest.approx(2.0)
    assert few_shot["random"]["arms"]["routed"]["difference"]["value"] == pytest.approx(0.2)
    zero_shot = result["comparisons"]["zero_shot"]["dense"]
    assert "direct" not in zero_shot["arms"]
    assert zero_shot["score"] == pytest.approx(0.15)  # the first metric; seeds 0.1 and 0.2
    assert zero_shot["arms"]["random"]["difference"]["value"] == pytest.approx(0.2)
    assert result["comparisons"]["training_tasks"]["dense"]["tasks"] == 3
    tables = "".join(text_tables(result))
    assert tables.count("minus dense") == 3 and "+0.100" in tables
    assert tables.count("\nmixture of experts") == 3 and tables.count("\ndirect fine-tuning") == 1


def test_the_report_has_all_arms(plan, tmp_path):
    result = write_results(plan, (1, 2))
    runs = {arm: plan.place(1, arm) for arm in ARMS[1:]}
    made = build.report(tmp_path / "page", runs, experiment=result)
    stored = files.read_json(tmp_path / RESULTS)["comparisons"]
    shown = files.read_json(tmp_path / "page/report.json")["arms"]
    names = {"direct": "direct fine-tuning", "routed": "mixture of experts"}
    for measure, of_base in stored.items():
        assert list(shown[measure]) == [names.get(base, base) for base in of_base]
        for base, found in of_base.items():
            as_shown = shown[measure][names.get(base, base)]
            assert as_shown["arms"] == {names.get(a, a): g for a, g in found["arms"].items()}
    # Two tasks and two seeds are too few for an interval.
    said = "Few-shot scores on unseen tasks: mixture of experts against dense +0.100, relative"
    assert any(f.startswith(said) for f in made.summary)
    page = made.page.read_text()
    assert "All arms" in page and "minus random" in page and "+25.0 %" in page
    # Of one seed, other sections have these findings.
    made = build.report(tmp_path / "one", runs, experiment=write_results(plan, (1,)))
    assert not any("against dense" in f for f in made.findings)
