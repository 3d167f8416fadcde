"""Sections of the report on single experts: what they correlate with, and who needs them."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from moe_jax.report import figures, page, statistics
from moe_jax.report.cluster_sections import LEVEL
from moe_jax.report.features import FEATURES
from moe_jax.report.inputs import NO_CATEGORY, Run, label
from moe_jax.report.route_sections import columns
from moe_jax.report.sections import Section


def correlations(run: Run, features: Mapping[str, Mapping[str, float]]) -> Section:
    """Correlation of every expert with categories and with measured features of tasks."""
    routes = run.routes
    result = Section("experts", "Which experts go with which categories and features")
    members = statistics.memberships([c for c in routes.categories if c != NO_CATEGORY])
    known = np.array([c != NO_CATEGORY for c in routes.categories])
    categories = {name: _at(known, member) for name, member in members.items()}
    untested = sorted(set(routes.categories) - {NO_CATEGORY, *categories})
    if untested:
        result.lack(
            f"Not tested, having fewer than {statistics.FEWEST} tasks inside or outside:"
            f" {', '.join(untested)}."
        )
    measured = {
        name: np.array([features.get(t, {}).get(name, np.nan) for t in routes.tasks])
        for name in (FEATURES if features else ())
    }
    if not features:
        result.lack("No eval/*/predictions.jsonl, so no measured features.")
    tested = statistics.correlations(routes.route_TxNxE, categories, measured)
    if not tested.tests:
        why = f"no category has {statistics.FEWEST} tasks inside and {statistics.FEWEST} outside"
        if tested.names:
            why = "every expert's weight is the same for all tasks"
        sentence = f"No expert can be tested against a category: {why}."
        result.findings.append(sentence)
        result.lack(sentence)
        return result
    keys = ("layer", "expert", "property", "r", "p", "q")
    rows = [
        [routes.layers[n], e, tested.names[c]]
        + [float(a[n, e, c]) for a in (tested.r_NxExC, tested.p_NxExC, tested.q_NxExC)]
        for n, e, c in tested.significant(LEVEL)
    ]
    result.numbers = {
        "tests": tested.tests,
        "permutations": tested.permutations,
        "level": LEVEL,
        "properties": tested.names,
        "categories": tested.names[: tested.categories],
        "untested": untested,
        "significant": [dict(zip(keys, row, strict=True)) for row in rows],
        "r": tested.r_NxExC.tolist(),
        "p": tested.p_NxExC.tolist(),
        "q": tested.q_NxExC.tolist(),
    }
    what = "correlations between an expert's weight and a category or feature"
    if rows:
        layer, expert, name, r = rows[0][:4]
        result.find(
            f"{len(rows)} of {tested.tests} {what} are significant after correction; the strongest "
            f"is expert {expert} of {layer} with “{name}” (r = {r:+.2f})."
        )
    else:
        result.find(f"None of {tested.tests} {what} is significant after correction.")
    result.explain(
        "Pearson correlation of an expert's weight with membership in a category, or with a "
        "feature measured on the task's examples (see the section on tasks). p is two-sided, "
        f"by {tested.permutations:,} permutations of the tasks; q = p corrected over all tests "
        f"by Holm. Dots mark q ≤ {LEVEL}; grey cells have equal values for every task."
    )
    count = routes.experts * len(routes.layers)
    r_CxF, q_CxF = (a.reshape(count, -1).T for a in (tested.r_NxExC, tested.q_NxExC))
    result.draw(
        "correlations",
        figures.heatmap(
            {"": r_CxF},
            tested.names,
            columns(routes),
            title="Correlation of experts with categories and features",
            what="r =",
            low=-1.0,
            short=[str(e) for _ in routes.layers for e in range(routes.experts)],
            blocks=routes.layers,
            groups=[
                ["category"] * tested.categories
                + ["feature"] * (len(tested.names) - tested.categories)
            ],
            marks=[c * count + n * routes.experts + e for n, e, c in tested.significant(LEVEL)],
            notes={i: f"q = {q:.2g}" for i, q in enumerate(q_CxF.ravel()) if np.isfinite(q)},
            sortable=True,
        ),
        "Blue is a positive, orange a negative correlation.",
    )
    if rows:
        result.table(
            [
                *page.texts("layer"),
                *page.numbers(0, "expert"),
                *page.texts("category or feature"),
                *page.numbers(2, "r"),
                *page.numbers(4, "p", "q", tiny=True),
            ],
            rows,
        )
    return result


def _at(known: np.ndarray, values: np.ndarray) -> np.ndarray:
    full = np.full(len(known), np.nan)
    full[known] = values
    return full


LEVELS = ("category", "subcategory")


def disabling(run: Run, evaluations: Mapping[str, Mapping[str, Any]]) -> Section:
    """The rise of the loss of every category and subcategory with each expert off, beside the
    correlation that should predict it.

    Args:
        evaluations: {evaluation: value of disabling.json}.
    """
    result = Section("disabling", "What is lost without an expert", numbers={})
    if evaluations:
        result.explain(
            "Each expert of each layer is off in turn, with the task's other weights scaled "
            "up, or the router's next choice where it had all the weight. Cells are the rise "
            "of the teacher-forced loss, in nats per target token, as a mean over tasks. r is "
            "the correlation of the expert's weight with membership, over the tasks that the "
            "model was trained on."
        )
    else:
        result.lack("No eval/*/disabling.json (eval.disable_examples), so nothing is known.")
    for evaluation, value in evaluations.items():
        if value["layers"] != run.routes.layers or int(value["experts"]) != run.routes.experts:
            result.lack(f"“{evaluation}” is left out: its layers are not the run's.")
            continue
        result.add(page.heading(f"Evaluation “{evaluation}”"))
        tasks = value["tasks"].values()
        result.numbers[evaluation] = {
            "step": value.get("step"),
            "tasks": len(tasks),
            "examples": int(sum(row["examples"] for row in tasks)),
        }
        levels = [level for level in LEVELS if any(row.get(level) for row in tasks)]
        for level in levels:
            _by_level(result, run, evaluation, level, value)
        if not levels:
            result.lack("Its tasks have no category, by which losses could be summed.")
    return result


def _by_level(
    result: Section, run: Run, evaluation: str, level: str, value: Mapping[str, Any]
) -> None:
    routes = run.routes
    rises: dict[str, list[np.ndarray]] = {}
    for row in value["tasks"].values():
        rise_F = np.ravel(row["without"]) - row["loss"]
        name = label(level, row.get("category"), row.get("subcategory"))
        rises.setdefault(name, []).append(rise_F)
    names = sorted(rises, key=lambda c: (c == NO_CATEGORY, c))
    rise_CxF = np.array([np.mean(rises[c], 0) for c in names])
    labels = routes.labels(level)
    r_CxF = np.array([statistics.membership(routes.route_TxNxE, labels, c) for c in names])
    experts, rows = columns(routes), []
    everything = {c: np.array(rises[c]) for c in names}
    for c, category in enumerate(names):
        others = [everything[o] for o in names if o != category]
        for f, expert in enumerate(experts):
            elsewhere = float(np.concatenate(others)[:, f].mean()) if others else None
            r = None if np.isnan(r_CxF[c, f]) else float(r_CxF[c, f])
            rows.append([expert, category, r, float(rise_CxF[c, f]), elsewhere])
    keys = ("expert", level, "r", "rise", "rise_elsewhere")
    both = np.isfinite(r_CxF)
    predicted = None
    if both.sum() > 2 and np.ptp(r_CxF[both]) > 0 and np.ptp(rise_CxF[both]) > 0:
        predicted = float(np.corrcoef(r_CxF[both], rise_CxF[both])[0, 1])
    tied = [_most_tied(rows, category) for category in names]
    tied = sorted((row for row in tied if row), key=lambda row: -row[2])
    result.numbers[evaluation][level] = {
        "correlation_of_r_and_rise": predicted,
        "most_tied": [dict(zip((*keys, "ratio"), row, strict=True)) for row in tied],
        "rows": [dict(zip(keys, row, strict=True)) for row in rows],
    }
    compared = [row for row in tied if row[4] is not None]
    if compared:
        twice = sum(rise > 0 and rise >= 2 * elsewhere for *_, rise, elsewhere, _ in compared)
        expert, category, _, rise, elsewhere, _ = max(compared, key=lambda row: row[3])
        result.find(
            f"“{evaluation}”: without the expert that is most tied to it, the loss of {twice} of "
            f"{len(compared)} {level[:-1]}ies rises at least twice as much as that of the others. "
            f"It rises most for “{category}” without {expert}, by {page.signed(rise)} nats per "
            f"token (others {page.signed(elsewhere)}).",
            main=level == LEVELS[-1],
        )
    if predicted is not None:
        result.find(
            f"“{evaluation}”: over all experts, correlation with a {level} and rise of its loss "
            f"correlate by {predicted:+.2f}."
        )
    reach = float(max(1e-6, np.abs(rise_CxF).max()))
    result.draw(
        f"disabling {evaluation} {level}",
        figures.heatmap(
            {"": rise_CxF},
            names,
            experts,
            title=f"Rise of the loss without each expert by {level}, {evaluation}",
            what="rise of the loss",
            low=-reach,
            high=reach,
            short=[str(e) for _ in routes.layers for e in range(routes.experts)],
            blocks=routes.layers,
            notes={
                i: f"correlation with the {level} {r:+.2f}"
                for i, r in enumerate(r_CxF.ravel())
                if np.isfinite(r)
            },
            sortable=True,
        ),
        "Blue is a rise, orange a fall; the strongest colour is "
        f"{reach:.3f}. The correlation is shown where the pointer is.",
    )
    columns_ = [
        *page.texts("expert off", level),
        *page.numbers(2, "r"),
        *page.numbers(3, "rise of its loss", "of the other tasks"),
    ]
    if tied:
        result.explain(f"The expert most tied to each {level}:")
        result.table([*columns_, *page.numbers(1, "ratio")], tied)
    rows.sort(key=lambda row: -row[3])
    result.add(page.details(f"All experts, by {level}", page.table(columns_, rows)))


def _most_tied(rows: list[list], category: str) -> list | None:
    """The row of the expert with the highest correlation, and the ratio of its two rises, which
    is None unless the rise elsewhere is above 0."""
    tied = [row for row in rows if row[1] == category and row[2] is not None]
    if not tied:
        return None
    row = max(tied, key=lambda row: row[2])
    return [*row, row[3] / row[4] if row[4] is not None and row[4] > 1e-9 else None]
