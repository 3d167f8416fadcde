"""Metrics of a run: a JSON-lines file that is consistent after interruptions, and TensorBoard
events."""

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

# Not a SummaryWriter: those of tensorboardX and PyTorch import torch, TensorBoard's TensorFlow.
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from moe_jax.core import files
from moe_jax.core.errors import UserError

METRICS = "metrics.jsonl"


class MetricsLog:
    """metrics.jsonl and TensorBoard events of a model directory.

    Args:
        step: the step the run starts at; lines of an interrupted run after this step are dropped.
        enabled: only one process of a run writes.
    """

    def __init__(self, model_dir: str | Path, step: int, enabled: bool = True):
        self._enabled = enabled
        if not enabled:
            return
        path = Path(model_dir) / METRICS
        files.write_jsonl(path, _kept(path, step) if path.exists() else [])
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115
        self._events = EventFile(model_dir, step + 1)

    def write(self, step: int, kind: str, values: dict[str, float]) -> None:
        """Appends one line and the same scalars as events under `kind/`."""
        if not self._enabled:
            return
        try:
            self._file.write(files.json_line({"step": step, "kind": kind, **values}))
            self._file.flush()
            self._events.write(step, {f"{kind}/{name}": value for name, value in values.items()})
        except (OSError, ValueError) as e:
            raise UserError(f"step {step}: cannot log {kind} metrics: {e}") from e

    def close(self) -> None:
        """Flushes and closes both files."""
        if self._enabled:
            self._file.close()
            self._events.close()


class EventFile:
    """Scalars for TensorBoard, in a new file of `directory`.

    Args:
        first_step: TensorBoard ignores data from this step on in the directory's earlier files.
    """

    def __init__(self, directory: str | Path, first_step: int):
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        self._records = RecordWriter(open(Path(directory) / name, "ab"))  # noqa: SIM115
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


def _kept(path: Path, step: int) -> list[Any]:
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # the last line of a killed run may be incomplete
            continue
        if row["step"] <= step:
            kept.append(row)
    return kept


class Window:
    """Means over the steps since the last line. Metrics are read from the device one step late."""

    def __init__(self):
        self._waiting: list[dict[str, jax.Array]] = []
        self._rows: list[dict[str, float]] = []
        self._start = time.perf_counter()
        self.last: dict[str, float] = {}

    def add(self, metrics: dict[str, jax.Array]) -> None:
        """Adds a step's metrics without waiting for the device."""
        self._waiting.append(metrics)
        if len(self._waiting) > 1:
            self._read()

    def _read(self) -> None:
        self.last = {k: float(v) for k, v in jax.device_get(self._waiting.pop(0)).items()}
        self._rows.append(self.last)

    def close(self) -> dict[str, float]:
        """The line for the steps since the last call.

        Raises:
            UserError: the loss is not finite.
        """
        while self._waiting:
            self._read()
        seconds = time.perf_counter() - self._start
        line = {k: float(np.mean([row[k] for row in self._rows])) for k in self._rows[0]}
        if not np.isfinite(line["loss"]) or not np.isfinite(line["gradient_norm"]):
            raise UserError("the loss or its gradient is no longer finite; lower the learning rate")
        tokens = sum(row["target_tokens"] for row in self._rows)
        line["time/step_s"] = seconds / len(self._rows)
        line["time/target_tokens_per_s"] = tokens / seconds
        self.__init__()
        return line
