"""Sections of the report on the routes of one run."""

from collections import Counter

import numpy as np

from moe_jax.evaluation.gains import count
from moe_jax.report import page, route_plots, statistics
from moe_jax.report.inputs import NO_CATEGORY, Run
from moe_jax.report.plots import fixed
from moe_jax.report.sections import Section

LEVEL = 0.05  # false discovery rate, and p-value called significant


def sections(run: Run, permutations: int, seed: int) -> list[Section]:
    """The five sections on the routes of `run`, which must have routes."""
    similarity_TxT = statistics.similarity(run.routes.route_TxNxE)
    return [
        _routes(run, similarity_TxT),
        _similarity(run, similarity_TxT),
        _agreement(run, similarity_TxT, permutations, seed),
        _experts(run),
        _decidedness(run),
    ]


def without_routes() -> list[Section]:
    """The one section that says that there are no routes."""
    sentence = "No run has a routes.json, so routes are left out."
    return [Section("routes", "Routes", [page.missing(sentence)])]


def _routes(run: Run, similarity_TxT: np.ndarray) -> Section:
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
    result.findings.append(sentence)
    result.add(
        page.paragraph(sentence),
        page.soft(
            f"{count(layers, 'routed layer')} with {count(experts, 'expert')} each, at step "
            f"{routes.step}. Rows are tasks in the order of the ontology, columns experts layer by "
            "layer."
        ),
        result.draw(
            "routes",
            route_plots.heatmap(
                routes.route_TxNxE,
                routes.layers,
                routes.tasks,
                routes.categories,
                routes.subcategories,
            ),
            "Weight of every expert in every task's route",
        ),
    )
    return result


def _similarity(run: Run, similarity_TxT: np.ndarray) -> Section:
    routes = run.routes
    result = Section("similarity", "Which tasks route alike")
    reason = _degenerate(similarity_TxT)
    if reason:
        result.add(page.missing(f"There is nothing to cluster: {reason}."))
        return result
    tree = statistics.tree(similarity_TxT)
    cluster_T = statistics.cut(tree, max(2, len(set(routes.categories) - {NO_CATEGORY})))
    members = [np.flatnonzero(cluster_T == c) for c in dict.fromkeys(cluster_T.tolist())]
    members.sort(key=len, reverse=True)
    result.numbers = {
        "linkage": statistics.LINKAGE,
        "clusters": [[routes.tasks[i] for i in group] for group in members],
        "tasks": routes.tasks,
        "cosine_similarity": similarity_TxT.tolist(),
    }
    rows = []
    for number, group in enumerate(members, 1):
        counts = Counter(routes.categories[i] for i in group).most_common()
        rows.append(
            [
                number,
                len(group),
                ", ".join(f"{c} {n}" for c, n in counts),
                ", ".join(routes.tasks[i] for i in group),
            ]
        )
    result.add(
        page.soft(
            "Cosine similarity of the tasks' flattened routes, with rows and columns in the order "
            f"of hierarchical clustering ({statistics.LINKAGE} linkage of cosine distances). "
            "Colours at the left are the human categories."
        ),
        result.draw(
            "similarity",
            route_plots.clusters(similarity_TxT, tree, routes.tasks, routes.categories),
            "Clustered similarity of routes between tasks",
        ),
        page.heading(f"The tree cut into {len(members)} clusters"),
        page.table(
            [*page.numbers(0, "cluster", "tasks"), *page.texts("categories", "members", wide=True)],
            rows,
        ),
    )
    return result


def _agreement(run: Run, similarity_TxT: np.ndarray, permutations: int, seed: int) -> Section:
    routes = run.routes
    result = Section("agreement", "Do the clusters agree with human categories?", numbers={})
    reason = _degenerate(similarity_TxT)
    if reason:
        sentence = f"Agreement of routes with the ontology cannot be measured: {reason}."
        result.findings.append(sentence)
        result.add(page.missing(sentence))
        return result
    known = [i for i, c in enumerate(routes.categories) if c != NO_CATEGORY]
    levels = {
        "categories": [routes.categories[i] for i in known],
        "subcategories": [f"{routes.categories[i]} / {routes.subcategories[i]}" for i in known],
    }
    tree = statistics.tree(similarity_TxT)
    measured, rows = {}, []
    for level, labels in levels.items():
        classes = len(set(labels))
        if not 1 < classes < len(labels):
            result.add(
                page.missing(
                    f"{level.capitalize()} are left out: {len(labels)} tasks in {classes} of them "
                    "are not a grouping that clusters could match."
                )
            )
            continue
        cluster_T = statistics.cut(tree, classes)
        measured[level] = a = statistics.agreement(labels, cluster_T[known], permutations, seed)
        result.numbers[level] = {
            "classes": classes,
            "clusters": int(cluster_T.max()),
            "tasks": len(labels),
            "ami": a.ami,
            "control_mean": a.control_mean,
            "control_95": a.control_range,
            "p_value": a.p_value,
            "permutations": permutations,
        }
        low, high = a.control_range
        verdict = "more than" if a.p_value < LEVEL else "no more than"
        result.findings.append(
            f"Clusters of routes agree with the {classes} human {level} {verdict} chance would: "
            f"adjusted mutual information {fixed(a.ami, 2)}, shuffled control "
            f"{fixed(a.control_mean, 2)} (95 % in {fixed(low, 2)} to {fixed(high, 2)}), "
            f"p = {a.p_value:.2g}."
        )
        rows.append(
            [
                level,
                classes,
                int(cluster_T.max()),
                len(labels),
                a.ami,
                a.control_mean,
                low,
                high,
                a.p_value,
            ]
        )
    if not measured:
        return result
    result.add(
        *map(page.paragraph, result.findings),
        page.soft(
            f"The tree ({statistics.LINKAGE} linkage) is cut into as many clusters as there are "
            "classes, or fewer where routes tie. Adjusted mutual information is 1 for equal "
            "partitions and about 0 by chance. The control shuffles the labels among the tasks "
            f"{permutations} times; p is the share of shuffles (counting the real one) that agree "
            "at least as well."
        ),
        result.draw(
            "agreement", route_plots.controls(measured), "Agreement with the ontology and by chance"
        ),
        page.table(
            [
                *page.texts("level"),
                *page.numbers(0, "classes", "clusters", "tasks"),
                *page.numbers(3, "AMI", "control mean", "control 2.5 %", "control 97.5 %"),
                *page.numbers(4, "p", tiny=True),
            ],
            rows,
        ),
    )
    return result


def _experts(run: Run) -> Section:
    routes = run.routes
    result = Section("experts", "Which experts go with which categories")
    known = [i for i, c in enumerate(routes.categories) if c != NO_CATEGORY]
    categories = [routes.categories[i] for i in known]
    route_TxNxE = routes.route_TxNxE[known]
    tested = statistics.correlations(route_TxNxE, categories)
    if tested.untested:
        result.add(
            page.missing(
                "Not tested, having fewer than 3 tasks inside or outside: "
                f"{', '.join(tested.untested)}."
            )
        )
    if not tested.tests:
        why = "no category has 3 tasks inside and 3 outside"
        if tested.categories:
            why = "every expert's weight is the same for all tasks"
        sentence = f"No expert can be tested against a category: {why}."
        result.findings.append(sentence)
        result.add(page.missing(sentence))
        return result
    rows = []
    for n, e, c in tested.significant(LEVEL):
        inside_T = np.array([category == tested.categories[c] for category in categories])
        weight_T = route_TxNxE[:, n, e]
        rows.append(
            [
                routes.layers[n],
                e,
                tested.categories[c],
                float(tested.r_NxExC[n, e, c]),
                float(weight_T[inside_T].mean()),
                float(weight_T[~inside_T].mean()),
                float(tested.p_NxExC[n, e, c]),
                float(tested.q_NxExC[n, e, c]),
            ]
        )
    keys = ("layer", "expert", "category", "r", "mean_inside", "mean_outside", "p", "q")
    result.numbers = {
        "tests": tested.tests,
        "level": LEVEL,
        "categories": tested.categories,
        "untested": tested.untested,
        "significant": [dict(zip(keys, row, strict=True)) for row in rows],
        "r": tested.r_NxExC.tolist(),
        "p": tested.p_NxExC.tolist(),
        "q": tested.q_NxExC.tolist(),
    }
    if rows:
        layer, expert, category, r = rows[0][:4]
        sentence = (
            f"{len(rows)} of {tested.tests} correlations between an expert's weight and a category "
            f"are significant after correction; the strongest is expert {expert} of {layer} with "
            f"“{category}” (r = {r:+.2f})."
        )
    else:
        sentence = (
            f"None of {tested.tests} correlations between an expert's weight and a category is "
            "significant after correction."
        )
    result.findings.append(sentence)
    result.add(
        page.paragraph(sentence),
        page.soft(
            "Point-biserial correlation of an expert's weight with membership in a category, over "
            f"{len(known)} tasks; two-sided p, and q = p corrected over all tests by Benjamini and "
            f"Hochberg. Dots mark q ≤ {LEVEL}; grey cells have equal weight for every task."
        ),
        result.draw(
            "correlations",
            route_plots.correlations(tested, routes.layers, LEVEL),
            "Correlation of experts with categories",
        ),
    )
    if rows:
        result.add(
            page.table(
                [
                    *page.texts("layer"),
                    *page.numbers(0, "expert"),
                    *page.texts("category"),
                    *page.numbers(2, "r", "weight inside", "outside"),
                    *page.numbers(4, "p", "q", tiny=True),
                ],
                rows,
            )
        )
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
        result.add(page.missing("With one expert per layer there is nothing to decide."))
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
    result.findings.append(sentence)
    result.add(
        page.paragraph(sentence),
        page.soft(
            "Dependence on the task is the mutual information of task and expert in a layer, as a "
            "share of log E: 0 where all tasks route alike, 1 where each takes one expert and all "
            "experts are used equally."
        ),
        page.pair(
            result.draw(
                "entropy",
                route_plots.entropies(entropy_TxN, information_N, routes.layers),
                "Entropy of routes per layer",
            ),
            result.draw(
                "usage",
                route_plots.usage(usage_NxE, routes.layers),
                "Mean weight of every expert per layer",
            ),
        ),
        page.table(
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
        ),
    )
    return result


def _degenerate(similarity_TxT: np.ndarray) -> str:
    """Why routes cannot be clustered; '' if they can."""
    if len(similarity_TxT) < 3:
        return "there are fewer than 3 tasks"
    if statistics.distinct_routes(similarity_TxT) == 1:
        return "all tasks take the same route"
    return ""
