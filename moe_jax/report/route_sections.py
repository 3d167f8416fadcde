"""Sections of the report on the routes of one run."""

from collections.abc import Mapping

import numpy as np

from moe_jax.evaluation.gains import count
from moe_jax.report import cluster_sections, figures, page, statistics
from moe_jax.report.inputs import Routes, Run
from moe_jax.report.sections import Section


def sections(
    run: Run, history: Mapping[int, np.ndarray], permutations: int, links: Mapping[str, str]
) -> list[Section]:
    """The sections on the routes of `run`, which must have routes.

    Args:
        history: {step: routes [T, N, E]}, the final ones last.
    """
    similarity_TxT = statistics.similarity(run.routes.route_TxNxE)
    return [
        _routes(run, history, similarity_TxT, links),
        _evolution(run, history),
        cluster_sections.similarity(run, similarity_TxT, links),
        cluster_sections.agreement(run, similarity_TxT, permutations),
        _decidedness(run),
    ]


def columns(routes: Routes) -> list[str]:
    """The name of every expert of every layer."""
    return [f"{layer} expert {e}" for layer in routes.layers for e in range(routes.experts)]


def without_routes() -> Section:
    """The section that says that there are no routes."""
    sentence = "No run has a routes.json, so routes are left out."
    return Section("routes", "Routes", [page.missing(sentence)])


def _routes(
    run: Run,
    history: Mapping[int, np.ndarray],
    similarity_TxT: np.ndarray,
    links: Mapping[str, str],
) -> Section:
    routes = run.routes
    tasks, layers, experts = routes.route_TxNxE.shape
    distinct = statistics.distinct_routes(similarity_TxT)
    spread = float(1 - similarity_TxT.min())
    result = Section("routes", f"Routes of “{run.name}”")
    result.numbers = {
        "run": run.name,
        "step": routes.step,
        "layers": routes.layers,
        "experts": experts,
        "distinct_routes": distinct,
        "largest_cosine_distance": spread,
        "tasks": {
            task: {"category": c, "subcategory": s, "route": route.tolist()}
            for task, c, s, route in zip(
                routes.tasks,
                routes.categories,
                routes.subcategories,
                routes.route_TxNxE,
                strict=True,
            )
        },
    }
    if distinct == 1 and tasks > 1:
        sentence = f"All {tasks} tasks of “{run.name}” take the same route."
    elif tasks == 1:
        sentence = f"“{run.name}” has routes of one task only."
    else:
        sentence = (
            f"The {tasks} tasks of “{run.name}” take {distinct} different routes; the largest "
            f"cosine distance between two of them is {spread:.2g} (0 is the same, 1 disjoint)."
        )
    result.find(sentence, main=True)
    result.explain(
        f"{count(layers, 'routed layer')} with {count(experts, 'expert')} each, at step "
        f"{routes.step}. Rows are tasks, columns experts layer by layer. The slider shows the "
        "routes at earlier evaluations. A click on an expert's number sorts by its weight, a "
        "click on a task shows its predictions."
    )
    orders = {}
    if not cluster_sections.degenerate(similarity_TxT):
        order = statistics.leaves(statistics.tree(similarity_TxT))
        orders["clusters of routes"] = np.argsort(order)
    result.draw(
        "routes",
        figures.heatmap(
            {f"step {step:,}": history[step] for step in figures.spread(list(history))},
            routes.tasks,
            columns(routes),
            title="Weight of every expert in every task's route",
            what="weight",
            short=[str(e) for _ in routes.layers for e in range(experts)],
            blocks=routes.layers,
            groups=[routes.categories, routes.subcategories],
            links=[links.get(task, "") for task in routes.tasks],
            orders=orders,
            given="ontology",
            slider="Training",
            sortable=True,
        ),
        "The stronger its colour, the larger the weight of the expert in the task's route.",
    )
    return result


def _evolution(run: Run, history: Mapping[int, np.ndarray]) -> Section:
    """How decided the routes were at each evaluation, and how they agreed with the ontology."""
    result = Section("evolution", "Routes over training", numbers={})
    if len(history) < 2:
        result.lack("There are no routes of earlier steps (routes/STEP.json).")
        return result
    known, labels_of = cluster_sections.levels(run.routes)
    labels_of = {k: v for k, v in labels_of.items() if 1 < len(set(v)) < len(v)}
    for step, route_TxNxE in history.items():
        similarity_TxT = statistics.similarity(route_TxNxE)
        numbers: dict[str, float | None] = {
            "distinct_routes": statistics.distinct_routes(similarity_TxT),
            "entropy": float(statistics.entropy(route_TxNxE).mean()),
            "task_information": float(statistics.task_information(route_TxNxE).mean()),
        }
        inside_TxT = similarity_TxT[np.ix_(known, known)]
        for level, labels in labels_of.items():
            ami = near = None
            if not cluster_sections.degenerate(inside_TxT):
                ami, near = cluster_sections.matches(labels, inside_TxT)
            numbers |= {f"ami_{level}": ami, f"neighbour_accuracy_{level}": near}
        result.numbers[str(step)] = numbers
    rows = [[int(step), *numbers.values()] for step, numbers in result.numbers.items()]
    names = ["mean entropy", "dependence on task"]
    names += [f"{m} {level}" for level in labels_of for m in ("AMI,", "neighbour,")]
    result.table([*page.numbers(0, "step", "routes"), *page.numbers(3, *names)], rows)
    curves = {
        name: ([row[0] for row in rows], [row[i] for row in rows])
        for i, name in enumerate(names, 2)
        if all(row[i] is not None for row in rows)
    }
    result.draw("evolution", figures.lines(curves, title="Routes over training"))
    return result


def _decidedness(run: Run) -> Section:
    routes = run.routes
    result = Section("decided", "How decided the routes are")
    entropy_TxN = statistics.entropy(routes.route_TxNxE)
    information_N = statistics.task_information(routes.route_TxNxE)
    usage_NxE = routes.route_TxNxE.mean(0)
    result.numbers = {
        "mean_entropy": float(entropy_TxN.mean()),
        "layers": {
            layer: {
                "entropy": float(entropy_TxN[:, n].mean()),
                "task_information": float(information_N[n]),
                "usage": usage_NxE[n].tolist(),
            }
            for n, layer in enumerate(routes.layers)
        },
    }
    if routes.experts == 1:
        result.lack("With one expert per layer there is nothing to decide.")
        return result
    top = int(np.argmax(information_N))
    if information_N[top] < 1e-6:
        dependence = "no layer's route depends on the task"
    else:
        dependence = (
            f"routes depend on the task by {information_N.mean():.2f} on average, most in "
            f"{routes.layers[top]} ({information_N[top]:.2f})"
        )
    sentence = (
        f"Mean entropy of a route is {entropy_TxN.mean():.2f} of its maximum (0 is one expert, "
        f"1 all equally); {dependence}."
    )
    result.find(sentence)
    result.explain(
        "Dependence on the task is the mutual information of task and expert in a layer, as a "
        "share of log E: 0 where all tasks route alike, 1 where each takes one expert and all "
        "experts are used equally."
    )
    result.table(
        [
            *page.texts("layer"),
            *page.numbers(2, "mean entropy", "dependence on task"),
            *page.numbers(2, *(f"use of expert {e}" for e in range(routes.experts))),
        ],
        [
            [
                layer,
                float(entropy_TxN[:, n].mean()),
                float(information_N[n]),
                *usage_NxE[n].tolist(),
            ]
            for n, layer in enumerate(routes.layers)
        ],
    )
    return result
