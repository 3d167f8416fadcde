"""Runs stages in order; each is kept as long as what it was made from stays the same."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_jax.core import files
from moe_jax.core.checksums import digest
from moe_jax.core.errors import say

RECORD = "stage.json"


@dataclasses.dataclass(frozen=True)
class Stage:
    """One step of an experiment, whose outcome is a directory.

    Attributes:
        name: its directory below the experiment's: SEED/STAGE.
        kind: what it does: stages of one kind take about equally long for the same `work`.
        inputs: JSON: all that decides its outcome, beside its parents.
        parents: names of the stages that it reads.
        run: does the work, or goes on with it where it was interrupted.
        shown: the same in words.
        work: how much there is to do, such as the number of steps.
    """

    name: str
    kind: str
    inputs: Any
    parents: tuple[str, ...]
    run: Callable[[], None]
    shown: str
    work: float = 1.0


def fingerprints(stages: Sequence[Stage]) -> dict[str, str]:
    """Name -> hash of all that decides a stage's outcome. Parents come before their children."""
    found: dict[str, str] = {}
    for stage in stages:
        found[stage.name] = digest([stage.kind, stage.inputs, [found[p] for p in stage.parents]])
    return found


def run_stages(root: Path, stages: Sequence[Stage]) -> Iterator[Stage]:
    """Runs the stages that are not done, and yields each when it is.

    `RECORD` in a stage's directory says from what it was made. If that changed, the directory is
    set aside under its fingerprint, and taken back when the same is wanted again.

    Args:
        root: the experiment's directory.
        stages: parents before children.
    """
    wanted = fingerprints(stages)
    begin = time.perf_counter()
    for number, stage in enumerate(stages):
        place, fingerprint = root / stage.name, wanted[stage.name]
        _take_place(place, fingerprint)
        record = read_record(place)
        spent = clock(time.perf_counter() - begin)
        left = time_left(stages, {s.name: read_record(root / s.name) for s in stages}, wanted)
        print(f"\n== {stage.name} ({number + 1} of {len(stages)}, {spent} so far{left})")
        print(stage.shown, flush=True)
        if record.get("done"):
            print("done before", flush=True)
        else:
            files.write_json(place / RECORD, {"fingerprint": fingerprint, "done": False})
            start = time.perf_counter()
            stage.run()
            seconds = time.perf_counter() - start
            # How long a whole run takes is not known from one that was interrupted.
            done = {"done": True, "seconds": None if record else seconds}
            files.write_json(place / RECORD, {"fingerprint": fingerprint, **done})
            print(f"{seconds:.0f} s", flush=True)
        yield stage


def read_record(place: Path) -> Mapping[str, Any]:
    """What `RECORD` in a directory says; empty where there is none."""
    path = place / RECORD
    return files.read_object(path) if path.exists() else {}


def time_left(
    stages: Sequence[Stage], records: Mapping[str, Mapping[str, Any]], wanted: Mapping[str, str]
) -> str:
    """`, about 12 min left`: what is not done, by how long what is done took.

    A stage takes as long as the same one of another seed, or else as others of its kind, in
    proportion to their work. What was never measured is not counted: `more than 12 min`.

    Args:
        records: what `read_record` says of each stage.
        wanted: the fingerprint of each stage.
    """
    same, kind, rest = {}, {}, []
    for stage in stages:
        record = records[stage.name]
        if not record.get("done") or record["fingerprint"] != wanted[stage.name]:
            rest.append(stage)
        elif record["seconds"] is not None:
            rate = record["seconds"] / stage.work
            same.setdefault(_in_seed(stage), []).append(rate)
            kind.setdefault(stage.kind, []).append(rate)
    rates = [same.get(_in_seed(stage)) or kind.get(stage.kind) for stage in rest]
    known = sum(
        stage.work * sum(rate) / len(rate)
        for stage, rate in zip(rest, rates, strict=True)
        if rate is not None
    )
    if not rest or not known:
        return ""
    return f", {'more than' if None in rates else 'about'} {clock(known)} left"


def clock(seconds: float) -> str:
    """`40 s`, `12 min`, `3 h 5 min`."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def _in_seed(stage: Stage) -> str:
    return stage.name.partition("/")[2]


def _take_place(place: Path, wanted: str) -> None:
    """Leaves at `place` what was made from the wanted inputs, or nothing."""
    found = read_record(place).get("fingerprint", wanted)
    if found != wanted:
        aside = place.with_name(f"{place.name}.{found}")
        say(f"the inputs of {place} changed: it is made again, and what was there is now {aside}")
        place.rename(aside)
    kept = place.with_name(f"{place.name}.{wanted}")
    if kept.exists() and not place.exists():
        say(f"{kept} was made from these inputs: it is {place} again")
        kept.rename(place)
