"""Builds a report: reads runs, computes, writes index.html and report.json."""

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_jax.core import files, paths
from moe_jax.core.errors import UserError, nearest
from moe_jax.report import (
    arm_sections,
    cluster_sections,
    expert_sections,
    inputs,
    page,
    route_sections,
    score_sections,
    transfer_sections,
)
from moe_jax.report.features import features
from moe_jax.report.inputs import Run
from moe_jax.report.sections import Section


@dataclasses.dataclass(frozen=True)
class Report:
    """The path of the page, its findings as sentences, and those that it begins with."""

    page: Path
    findings: list[str]
    summary: list[str]


def report(
    output: str | os.PathLike,
    runs: Mapping[str, str | os.PathLike],
    finetune: str | os.PathLike | None = None,
    model: str | None = None,
    single: str | os.PathLike | None = None,
    permutations: int = cluster_sections.PERMUTATIONS,
    experiment: Mapping[str, Any] | None = None,
) -> Report:
    """Writes OUTPUT/index.html (self-contained) and OUTPUT/report.json (all its numbers).

    Args:
        output: directory to write to; made if absent.
        runs: {name: run directory} in the order of the page. Later runs are compared with the
            first. The page names what a directory lacks and leaves it out.
        finetune: directory with the runs.jsonl of few-shot adaptation.
        model: name of the run that the page is about: its routes, experts and predictions are
            shown. By default the last that has routes over more than one expert, else the last
            that has any, else the last.
        single: directory of runs of one task each, to compare with.
        permutations: shuffled controls of the agreement with the ontology.
        experiment: the value of an experiment's results.json, to which the runs belong.

    Raises:
        UserError: a directory is missing, a file malformed, `model` unknown or without routes,
            or there is nothing to report at all.
    """
    read = [inputs.read_run(name, path) for name, path in runs.items()]
    rows = None if finetune is None else inputs.read_finetune(finetune)
    alone = None if single is None else inputs.read_single(single)
    if rows is None and not any(r.train or r.eval or r.scores or r.routes for r in read):
        places = ", ".join(str(r.path) for r in read) or "no run given"
        raise UserError(f"nothing to report: no metrics, scores, routes or tunings ({places})")
    chosen = _chosen(read, model)
    lines: dict[str, list] = {}
    for evaluation, line in inputs.read_predictions(chosen.path) if chosen else ():
        lines.setdefault(line["task"], []).append((evaluation, line))
    measured = features(line for of_task in lines.values() for _, line in of_task)
    links = {task: f"#task-{i}" for i, task in enumerate(lines)}
    adaptation = transfer_sections.adaptation(rows, finetune)
    parts: list[Section] = [] if experiment is None else [arm_sections.arms(experiment)]
    parts += [
        score_sections.scores(read, links),
        adaptation,
        transfer_sections.transfer(read, alone, adaptation.numbers, links),
    ]
    if chosen and chosen.routes:
        history = inputs.read_history(chosen.path, chosen.routes)
        parts += route_sections.sections(chosen, history, permutations, links)
        parts.append(expert_sections.correlations(chosen, measured))
        parts.append(expert_sections.disabling(chosen, inputs.read_disabling(chosen.path)))
    else:
        parts.append(route_sections.without_routes())
    parts.append(score_sections.losses(read))
    if chosen:
        parts.append(score_sections.tasks(chosen, lines, measured, links))
    few_shot = [] if finetune is None else [inputs.read_run("few-shot adaptation", finetune)]
    parts.append(score_sections.provenance([*read, *few_shot], chosen))
    return _write(paths.parse(output), finetune, chosen, parts)


def _chosen(runs: list[Run], name: str | None) -> Run | None:
    if name is not None:
        for run in runs:
            if run.name == name:
                if run.routes is None:
                    raise UserError(f"run {name!r} has no {run.path / 'routes.json'}")
                return run
        raise UserError(f"no run is named {name!r}{nearest(name, [r.name for r in runs])}")
    candidates = [run for run in runs if run.routes]
    choices = [run for run in candidates if run.routes.experts > 1] or candidates or runs
    return choices[-1] if choices else None


def _write(
    output: Path, finetune: str | os.PathLike | None, model: Run | None, parts: list[Section]
) -> Report:
    findings = [sentence for part in parts for sentence in part.findings]
    summary = [sentence for part in parts for sentence in part.main] or findings
    numbers = {
        "model": model and model.name,
        "finetune": None if finetune is None else str(finetune),
        "summary": summary,
        "findings": findings,
        **{part.name: part.numbers for part in parts},
    }
    files.write_json(output / "report.json", _finite(numbers))
    about = f"“{model.name}”" if model else "few-shot adaptation"
    if model and model.origin.get("date"):
        about += f", whose training began {model.origin['date']}"
    about += "" if finetune is None else f"; few-shot adaptation in {finetune}"
    rest = page.details(f"All {len(findings)} findings", page.bullets(findings))
    shown = {"summary": ("Summary", page.bullets(summary) + rest * (summary != findings))}
    shown |= {part.name: (part.title, "".join(part.parts)) for part in parts}
    drawn = {name: figure for part in parts for name, figure in part.figures.items()}
    html = page.page("Task-level mixture of experts", about, shown, _finite(drawn))
    files.write_text(output / "index.html", html)
    return Report(output / "index.html", findings, summary)


def _finite(value: Any) -> Any:
    """Replaces NaN (not tested) by null, because JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
