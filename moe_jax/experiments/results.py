"""All numbers of an experiment: scores of every arm, task and seed, and what they say together."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from moe_jax.core import files
from moe_jax.evaluation import gains, paired
from moe_jax.experiments.arms import (
    ARMS,
    COMPUTE,
    DENSE,
    DESCRIBED,
    DIRECT,
    PARAMETERS,
    RANDOM,
    ROUTED,
)
from moe_jax.experiments.plan import SPLIT, Plan
from moe_jax.report import cluster_sections, expert_sections, inputs, statistics
from moe_jax.report.arm_sections import MEASURES
from moe_jax.report.names import named
from moe_jax.unseen.adaptation import RUNS

RESULTS = "results.json"
# Arms that the others are compared with.
BASELINES = (DENSE, DESCRIBED, COMPUTE, PARAMETERS, RANDOM, DIRECT)


def write_results(plan: Plan, seeds: Sequence[int]) -> dict[str, Any]:
    """Writes and returns `RESULTS`: the scores of these seeds, and comparisons of all arms.

    Returns:
        `seeds`; `arms` {arm: what it is}; `comparisons` {measure: {baseline: the value of
        `paired.compare`}}; `scores` {measure: rows of `paired.compare`}; `routes` {seed: how far
        the mixture's routes agree with the ontology}; `experts` {seed: what each expert is
        for}. A few-shot score is the mean over the few-shot samples, so that a seed is one of the
        model.
    """
    scores = {
        "few_shot": list(_few_shot(plan, seeds)),
        "zero_shot": list(_evaluated(plan, seeds, plan.unseen.name)),
        "training_tasks": list(_evaluated(plan, seeds, plan.trained.name)),
    }
    result = {
        "seeds": list(seeds),
        "arms": {arm: ARMS[arm].what for arm in plan.arms},
        "comparisons": {measure: _comparisons(rows) for measure, rows in scores.items()},
        "scores": scores,
        "routes": {},
        "experts": {},
    }
    for seed in seeds if ROUTED in plan.arms else ():
        run = inputs.read_run(ROUTED, plan.place(seed, ROUTED))
        if run.routes is None:
            continue
        similarity_TxT = statistics.similarity(run.routes.route_TxNxE)
        agreement = cluster_sections.agreement(run, similarity_TxT, seed=seed)
        found = expert_sections.disabling(run, inputs.read_disabling(run.path))
        result["routes"][str(seed)] = agreement.numbers
        result["experts"][str(seed)] = _without_rows(found.numbers)
    files.write_json(plan.root / RESULTS, result)
    return result


def text_tables(result: Mapping[str, Any]) -> Iterator[str]:
    """A table for each measure, with the dense model as the baseline; names as in the report."""
    for measure, rows in result["scores"].items():
        rows = [row | {"arm": named(row["arm"])} for row in rows]
        yield f"{MEASURES[measure]}\n\n{paired.text_table(paired.compare(rows, named(DENSE)))}"


def _comparisons(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """{baseline: comparison of all arms with it} for the baselines that there are."""
    arms = {row["arm"] for row in rows}
    found = {base: paired.compare(rows, base) for base in BASELINES if base in arms}
    return {base: dataclasses.asdict(comparison) for base, comparison in found.items()}


def _evaluated(plan: Plan, seeds: Sequence[int], mixture: str) -> Iterator[dict[str, Any]]:
    """Rows of the trained models' scores on a mixture: each task's first metric."""
    for seed in seeds:
        for arm in plan.arms:
            if arm == DIRECT:
                continue
            path = plan.place(seed, arm) / "eval" / f"{mixture}_{SPLIT}" / "scores.jsonl"
            first = {line["task"]: line["score"] for line in reversed(list(files.read_jsonl(path)))}
            for task, score in sorted(first.items()):
                yield {"arm": arm, "task": task, "seed": seed, "score": score}


def _few_shot(plan: Plan, seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Rows of the adapted models' test scores, each the mean over the few-shot samples."""
    for seed in seeds:
        runs = [
            row | {"start": arms[row["start"]]}
            for place, arms in plan.few_shot(seed).items()
            for row in gains.read_rows(place / RUNS)
        ]
        found = gains.relative_gains(runs, baseline=DENSE)
        for task, cells in found["tasks"].items():
            for arm in plan.arms:
                score = float(np.mean(list(cells[arm]["per_seed"].values())))
                yield {"arm": arm, "task": task, "seed": seed, "score": score}


def _without_rows(value: Any) -> Any:
    """Findings on experts without those of every expert, which are in the report."""
    if isinstance(value, dict):
        return {key: _without_rows(inner) for key, inner in value.items() if key != "rows"}
    return value
