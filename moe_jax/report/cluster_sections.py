"""Sections of the report on which tasks route alike, and whether humans group them so."""

from collections import Counter
from collections.abc import Mapping

import numpy as np

from moe_jax.report import figures, page, statistics
from moe_jax.report.inputs import NO_CATEGORY, Routes, Run
from moe_jax.report.page import fixed
from moe_jax.report.sections import Section

LEVEL = 0.05  # p-value called significant
RANDOM_ROUTES = 200  # draws
PERMUTATIONS = 1000  # of labels


def similarity(run: Run, similarity_TxT: np.ndarray, links: Mapping[str, str]) -> Section:
    """The similarity of routes between tasks in the order of their clusters, and the clusters."""
    routes = run.routes
    result = Section("similarity", "Which tasks route alike")
    reason = degenerate(similarity_TxT)
    if reason:
        result.lack(f"There is nothing to cluster: {reason}.")
        return result
    tree = statistics.tree(similarity_TxT)
    # As many clusters as categories. Where distances tie, these may be one: then as subcategories.
    counts = (max(2, len(set(labels))) for labels in levels(routes)[1].values())
    cuts = (statistics.cut(tree, count) for count in counts)
    cluster_T = next((c for c in cuts if c.max() > 1), np.array([]))
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
    result.explain(
        "Cosine similarity of the tasks' flattened routes, with rows and columns in the order "
        f"of hierarchical clustering ({statistics.LINKAGE} linkage of cosine distances)."
    )
    order = statistics.leaves(tree)
    tasks = [routes.tasks[i] for i in order]
    result.draw(
        "similarity",
        figures.heatmap(
            {"": similarity_TxT[np.ix_(order, order)]},
            tasks,
            tasks,
            title="Clustered similarity of routes between tasks",
            what="similarity",
            low=min(float(similarity_TxT.min()), 0.99),
            groups=[[routes.categories[i] for i in order]],
            links=[links.get(task, "") for task in tasks],
            square=True,
        ),
    )
    if not members:
        result.lack("The tree cannot be cut into a few clusters, since distances of routes tie.")
        return result
    result.add(page.heading(f"The tree cut into {len(members)} clusters"))
    result.table(
        [*page.numbers(0, "cluster", "tasks"), *page.texts("categories", "members", wide=True)],
        rows,
    )
    return result


def agreement(
    run: Run, similarity_TxT: np.ndarray, permutations: int = PERMUTATIONS, seed: int = 0
) -> Section:
    """Adjusted mutual information and nearest neighbours, against labels and routes by chance."""
    routes = run.routes
    result = Section("agreement", "Do the routes agree with human categories?", numbers={})
    known, labels_of = levels(routes)
    reason = degenerate(similarity_TxT) or ("" if known else "no task has a category")
    if reason:
        sentence = f"Agreement of routes with the ontology cannot be measured: {reason}."
        result.findings.append(sentence)
        result.lack(sentence)
        return result
    inside_TxT = similarity_TxT[np.ix_(known, known)]
    random_RxTxT = [
        statistics.similarity(statistics.random_routes(routes.route_TxNxE[known], seed + draw))
        for draw in range(RANDOM_ROUTES)
    ]
    rows, bars = [], {}
    for level, labels in labels_of.items():
        classes, reason = len(set(labels)), ""
        if not 1 < classes < len(labels) or degenerate(inside_TxT):
            reason = "are not a grouping that routes could match"
        elif (chance := statistics.equal_by_chance(labels)) > 0.05:
            reason = f"are too few: {100 * chance:.0f} % of shuffles give the same partition"
        if reason:
            tasks = f"{len(labels)} tasks in {classes} of them"
            result.lack(f"{level.capitalize()} are left out: {tasks} {reason}.")
            continue
        clusters_T = statistics.cut(statistics.tree(inside_TxT), classes)
        ami = statistics.agreement(labels, clusters_T, permutations, seed)
        near = statistics.neighbour_agreement(labels, inside_TxT, permutations, seed)
        random = np.array([matches(labels, drawn_TxT) for drawn_TxT in random_RxTxT]).T
        numbers = {"classes": classes, "clusters": int(clusters_T.max()), "tasks": len(labels)}
        for name, measure, by_random in (
            ("ami", ami, statistics.Agreement(ami.value, random[0])),
            ("neighbour_accuracy", near, statistics.Agreement(near.value, random[1])),
        ):
            controls = {"shuffled labels": measure, "random routes": by_random}
            numbers[name] = {"value": measure.value} | {
                control: {
                    "mean": a.control_mean,
                    "range_95": a.control_range,
                    "p_value": a.p_value,
                    "draws": len(a.control),
                }
                for control, a in controls.items()
            }
            for control, a in controls.items():
                label = "AMI" if name == "ami" else "nearest neighbour"
                rows.append([level, label, a.value, control, a.control_mean, *a.control_range,
                             a.p_value])  # fmt: skip
            bars[f"{label.removeprefix('nearest ')}, {level}"] = controls
        result.numbers[level] = numbers
        result.find(
            f"{_clusters_finding(level, numbers, ami)}; the task with the most similar route is of "
            f"the same one for {100 * near.value:.0f} % of tasks (shuffled "
            f"{100 * near.control_mean:.0f} %, p = {near.p_value:.2g}).",
            main=True,
        )
    if not rows:
        return result
    result.explain(
        f"The tree ({statistics.LINKAGE} linkage) is cut into as many clusters as there are "
        "classes, or fewer where routes tie. Adjusted mutual information (AMI) is 1 for equal "
        "partitions and about 0 by chance. One control shuffles the labels among the tasks "
        f"{permutations} times; the other shuffles each layer's routes among the tasks, "
        f"{RANDOM_ROUTES} times, and clusters again. p is the share of controls (counting the "
        "real value) that agree at least as well."
    )
    kinds = list(next(iter(bars.values())))
    result.draw(
        "agreement",
        figures.dots(
            list(bars),
            {"this model": [next(iter(controls.values())).value for controls in bars.values()]}
            | {kind: [controls[kind].control_mean for controls in bars.values()] for kind in kinds},
            title="Agreement with the ontology and by chance",
            intervals={"this model": [None] * len(bars)}
            | {
                kind: [controls[kind].control_range for controls in bars.values()] for kind in kinds
            },
        ),
        "Bars hold 95 % of the controls.",
    )
    result.table(
        [
            *page.texts("level", "measure"),
            *page.numbers(3, "value"),
            *page.texts("control"),
            *page.numbers(3, "its mean", "2.5 %", "97.5 %"),
            *page.numbers(4, "p", tiny=True),
        ],
        rows,
    )
    return result


def levels(routes: Routes) -> tuple[list[int], dict[str, list[str]]]:
    """The tasks that the ontology knows, and the label of each at both of its levels."""
    known = [i for i, c in enumerate(routes.categories) if c != NO_CATEGORY]
    levels = {"categories": "category", "subcategories": "subcategory"}
    labels = {name: routes.labels(level) for name, level in levels.items()}
    return known, {name: [of_task[i] for i in known] for name, of_task in labels.items()}


def _clusters_finding(level: str, numbers: dict, ami: statistics.Agreement) -> str:
    classes, clusters = numbers["classes"], numbers["clusters"]
    if clusters == 1:
        return (
            f"Routes form no clusters that the {classes} human {level} could be compared with, "
            "since their distances tie"
        )
    low, high = ami.control_range
    verdict = "more than" if ami.p_value < LEVEL else "no more than"
    return (
        f"Clusters of routes agree with the {classes} human {level} {verdict} chance would: "
        f"adjusted mutual information {fixed(ami.value, 2)}, shuffled control "
        f"{fixed(ami.control_mean, 2)} (95 % in {fixed(low, 2)} to {fixed(high, 2)}), "
        f"p = {ami.p_value:.2g}"
    )


def matches(labels: list[str], similarity_TxT: np.ndarray) -> tuple[float, float]:
    """How well routes match labels: AMI of their clusters, and nearest-neighbour accuracy."""
    clusters_T = statistics.cut(statistics.tree(similarity_TxT), len(set(labels)))
    ami = statistics.agreement(labels, clusters_T, 1)
    return ami.value, statistics.neighbour_agreement(labels, similarity_TxT, 1).value


def degenerate(similarity_TxT: np.ndarray) -> str:
    """Why routes cannot be clustered; '' if they can."""
    if len(similarity_TxT) < 3:
        return "there are fewer than 3 tasks"
    if statistics.distinct_routes(similarity_TxT) == 1:
        return "all tasks take the same route"
    return ""
