"""Metrics of a run: a JSON-lines file that is consistent after interruptions, and TensorBoard
events."""

import json
import math
import os
import socket
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

# Not a SummaryWriter: those of tensorboardX and PyTorch import torch, TensorBoard's TensorFlow.
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from moe_jax.core import files, paths
from moe_jax.core.errors import UserError

METRICS = "metrics.jsonl"
EVENTS = "events.out.tfevents"
PERIOD = 30.0  # seconds between two times that they are written to a bucket
SCORE = "mean_score"  # of a line of kind `eval`


class MetricsLog:
    """metrics.jsonl and TensorBoard events of a model directory.

    In a bucket, where nothing can be appended to, they are written anew: when `publish` is called,
    and with a line that comes half a minute after the last time. Till then they grow here.

    Args:
        step: the step the run starts at; lines of an interrupted run after this step are dropped.
        enabled: only one process of a run writes.

    Attributes:
        scores: step -> mean dev score, of this run and of those that it goes on from.
    """

    def __init__(self, model_dir: str | Path, step: int, enabled: bool = True):
        self._enabled = enabled
        self.scores: dict[int, float] = {}
        if not enabled:
            return
        self._directory = directory = paths.parse(model_dir)
        self._here = None
        if paths.in_bucket(directory):
            self._here = tempfile.TemporaryDirectory()
            directory = Path(self._here.name)
            for path in self._directory.glob("*"):
                if path.name == METRICS or path.name.startswith(EVENTS):
                    files.write_bytes(directory / path.name, files.read_bytes(path))
        kept = _kept(directory / METRICS, step)
        self.scores |= {line["step"]: line[SCORE] for line in kept if SCORE in line}
        files.write_jsonl(directory / METRICS, kept)
        self._file = open(directory / METRICS, "a", encoding="utf-8")  # noqa: SIM115
        self._events = EventFile(directory, step + 1)
        self._published = -math.inf

    def write(self, step: int, kind: str, values: dict[str, float]) -> None:
        """Appends one line and the same scalars as events under `kind/`."""
        if SCORE in values:
            self.scores[step] = values[SCORE]
        if not self._enabled:
            return
        try:
            self._file.write(files.json_line({"step": step, "kind": kind, **values}))
            self._file.flush()
            self._events.write(step, {f"{kind}/{name}": value for name, value in values.items()})
        except (OSError, ValueError) as e:
            raise UserError(f"step {step}: cannot log {kind} metrics: {e}") from e
        if time.monotonic() > self._published + PERIOD:
            self.publish()

    def publish(self) -> None:
        """Returns when all lines are where other processes find them."""
        if self._enabled and self._here is not None:
            for path in Path(self._here.name).iterdir():
                files.write_bytes(self._directory / path.name, path.read_bytes())
            self._published = time.monotonic()

    def close(self) -> None:
        """Flushes and closes both files."""
        if self._enabled:
            self._file.close()
            self._events.close()
            self.publish()
            if self._here is not None:
                self._here.cleanup()


class EventFile:
    """Scalars for TensorBoard, in one file of `directory`, however often a run is started.

    Args:
        first_step: TensorBoard drops what is there already from this step on.
    """

    def __init__(self, directory: str | Path, first_step: int):
        name = f"{EVENTS}.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        earlier = sorted(Path(directory).glob(f"{EVENTS}.*"))
        path = earlier[-1] if earlier else Path(directory) / name
        file = open(path, "ab")  # noqa: SIM115 (closed by `close`)
        file.truncate(_whole_records(path))
        self._records = RecordWriter(file)
        self._add(file_version="brain.Event:2")
        self._add(step=first_step, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Adds the scalars of one step, by name."""
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._add(step=step, summary=Summary(value=scalars))

    def _add(self, **fields: Any) -> None:
        self._records.write(Event(wall_time=time.time(), **fields).SerializeToString())
        self._records.flush()

    def close(self) -> None:
        """Closes the file."""
        self._records.close()


def _whole_records(path: Path) -> int:
    """Bytes of the records before one that a kill cut short, which would hide all after it."""
    size, end = path.stat().st_size, 0
    with open(path, "rb") as file:
        while len(head := file.read(8)) == 8:  # length, its checksum, the event, its checksum
            next_end = end + 16 + int.from_bytes(head, "little")
            if next_end > size:
                break
            file.seek(end := next_end)
    return end


def _kept(path: Path, step: int) -> list[dict[str, Any]]:
    """The lines up to a step; what a kill cut short is left out."""
    kept = []
    if not path.exists():
        return kept
    for line in path.read_bytes().split(b"\n"):
        try:
            row = json.loads(line)
        except ValueError:  # the write that a kill cut short: no JSON, or half a character
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int) and row["step"] <= step:
            kept.append(row)
    return kept


class Window:
    """Means over the steps since the last line, read from the device one step late.

    A method that reads a loss or a gradient that is not finite raises a UserError.

    Args:
        rows: metrics of steps before, which a run that was stopped had not written yet.
    """

    def __init__(self, rows: Sequence[dict[str, float]] = ()):
        self._waiting: list[dict[str, jax.Array]] = []
        self._restart(rows)

    def _restart(self, rows: Sequence[dict[str, float]] = ()) -> None:
        self._rows: list[dict[str, float]] = list(rows)
        # From where, and from when on, steps are timed. Those given were another process's.
        self._timed = [(len(rows), time.perf_counter())]

    def compiled(self) -> None:
        """Tells that the step before was compiled: if others follow, only they are timed."""
        self._timed.append((len(self._rows) + len(self._waiting), time.perf_counter()))

    def add(self, metrics: dict[str, jax.Array]) -> None:
        """Adds a step's metrics without waiting for the device."""
        self._waiting.append(metrics)
        if len(self._waiting) > 1:
            self._read()

    def _read(self) -> None:
        metrics = jax.device_get(self._waiting.pop(0))
        row = {name: float(value) for name, value in metrics.items()}
        if not math.isfinite(row["loss"]) or not math.isfinite(row["gradient_norm"]):
            raise UserError("the loss or its gradient is no longer finite; lower the learning rate")
        self._rows.append(row)

    def rows(self) -> list[dict[str, float]]:
        """The metrics of every step since the last line."""
        while self._waiting:
            self._read()
        return self._rows

    def close(self) -> dict[str, float]:
        """The line for the steps since the last call."""
        rows, end = self.rows(), time.perf_counter()
        first, start = next(timed for timed in reversed(self._timed) if timed[0] < len(rows))
        timed, seconds = rows[first:], end - start
        line = {k: float(np.mean([row[k] for row in rows])) for k in rows[0]}
        tokens = sum(row["target_tokens"] for row in timed)
        line["time/step_s"] = seconds / len(timed)
        line["time/target_tokens_per_s"] = tokens / seconds
        self._restart()
        return line
