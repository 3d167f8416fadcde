"""Builds a report: reads runs, computes, draws, writes index.html, PNGs and report.json."""

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_jax.core import files
from moe_jax.core.errors import UserError, nearest
from moe_jax.report import inputs, page, plots, route_sections, sections
from moe_jax.report.inputs import Run
from moe_jax.report.sections import Section


@dataclasses.dataclass(frozen=True)
class Report:
    """The path of the page, and its findings as sentences."""

    page: Path
    findings: list[str]


def report(
    output: str | os.PathLike,
    runs: Mapping[str, str | os.PathLike],
    finetune: str | os.PathLike | None = None,
    routes: str | None = None,
    permutations: int = 1000,
    seed: int = 0,
) -> Report:
    """Writes OUTPUT/index.html (self-contained), OUTPUT/*.png and OUTPUT/report.json.

    Args:
        output: directory to write to; made if absent.
        runs: {name: run directory} in the order of the page. Later runs are compared with the
            first. The page names what a directory lacks and leaves it out.
        finetune: directory with the runs.jsonl of few-shot adaptation.
        routes: name of the run whose routes to analyse; by default the last that has routes over
            more than one expert, else the last that has any.
        permutations: shuffled controls of the agreement with the ontology.
        seed: of those shuffles.

    Raises:
        UserError: a directory is missing, a file malformed, `routes` unknown or without routes,
            or there is nothing to report at all.
    """
    read = [inputs.read_run(name, path) for name, path in runs.items()]
    rows = None if finetune is None else inputs.read_finetune(finetune)
    if rows is None and not any(r.train or r.eval or r.scores or r.routes for r in read):
        places = ", ".join(str(r.path) for r in read) or "no run given"
        raise UserError(f"nothing to report: no metrics, scores, routes or tunings ({places})")
    analysed = _with_routes(read, routes)
    starts = dict.fromkeys(str(row.get("start")) for row in rows or [])
    names = dict.fromkeys([*runs, *(s for s in starts if s != "untrained")])
    colours = {name: plots.colour(i, len(names)) for i, name in enumerate(names)}
    parts: list[Section] = [
        sections.scores(read, colours),
        sections.adaptation(rows, colours),
        *(
            route_sections.sections(analysed, permutations, seed)
            if analysed
            else route_sections.without_routes()
        ),
        sections.losses(read, colours),
    ]
    return _write(Path(output), read, finetune, parts)


def _with_routes(runs: list[Run], name: str | None) -> Run | None:
    if name is not None:
        for run in runs:
            if run.name == name:
                if run.routes is None:
                    raise UserError(f"run {name!r} has no {run.path / 'routes.json'}")
                return run
        raise UserError(f"no run is named {name!r}{nearest(name, [r.name for r in runs])}")
    candidates = [run for run in runs if run.routes]
    choices = [run for run in candidates if run.routes.experts > 1] or candidates
    return choices[-1] if choices else None


def _write(
    output: Path, runs: list[Run], finetune: str | os.PathLike | None, parts: list[Section]
) -> Report:
    findings = [sentence for part in parts for sentence in part.findings]
    pngs = {f"{name}.png": data for part in parts for name, data in part.figures.items()}
    for name, data in pngs.items():
        files.write_bytes(output / name, data)
    numbers = {
        "runs": {run.name: str(run.path) for run in runs},
        "finetune": None if finetune is None else str(finetune),
        "findings": findings,
        **{part.name: part.numbers for part in parts},
        "figures": list(pngs),
    }
    files.write_json(output / "report.json", _finite(numbers))
    named = [f"{run.name} ({run.path})" for run in runs]
    named += [] if finetune is None else [f"few-shot adaptation ({finetune})"]
    shown = {"summary": ("Summary", page.bullets(findings))}
    shown |= {part.name: (part.title, "".join(part.parts)) for part in parts}
    html = page.page("Task-level mixture of experts", f"Runs: {', '.join(named)}", shown)
    files.write_text(output / "index.html", html)
    return Report(output / "index.html", findings)


def _finite(value: Any) -> Any:
    """Replaces NaN (not tested) by null, because JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
