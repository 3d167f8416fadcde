"""metrics.jsonl and TensorBoard events of runs that were interrupted and resumed."""

import json
from types import SimpleNamespace

import jax.numpy as jnp
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moe_jax.core.errors import UserError
from moe_jax.training import logs
from moe_jax.training.logs import MetricsLog, Window


def lines(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_lines_and_events(tmp_path):
    log = MetricsLog(tmp_path, 0)
    log.write(2, "train", {"loss": 1.5})
    log.write(2, "eval", {"mean_score": 0.25})
    log.close()
    assert lines(tmp_path) == [
        {"step": 2, "kind": "train", "loss": 1.5},
        {"step": 2, "kind": "eval", "mean_score": 0.25},
    ]
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(2, 1.5)]
    assert [(e.step, e.value) for e in events.Scalars("eval/mean_score")] == [(2, 0.25)]


def test_going_on_drops_what_came_after_the_checkpoint(tmp_path):
    log = MetricsLog(tmp_path, 0)
    for step in (1, 2, 3, 4):
        log.write(step, "train", {"loss": float(step)})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 5, "ki')
    log = MetricsLog(tmp_path, 2)
    log.write(3, "train", {"loss": 30.0})
    log.close()
    actual = [(row["step"], row["loss"]) for row in lines(tmp_path)]
    assert actual == [(1, 1.0), (2, 2.0), (3, 30.0)]
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == actual


def test_one_file_of_events_however_often_a_run_is_started(tmp_path):
    """An event that a kill cut short does not hide those after it."""
    for step in range(4):
        log = MetricsLog(tmp_path, step)
        log.write(step + 1, "train", {"loss": float(step)})
        log.close()
        (path,) = tmp_path.glob("events.out.tfevents.*")
        if step % 2:
            path.write_bytes(path.read_bytes() + b"\x20\0\0\0\0\0\0\0half"[: 4 * step])
    events = EventAccumulator(str(tmp_path)).Reload()
    found = [(e.step, e.value) for e in events.Scalars("train/loss")]
    assert found == [(1, 0.0), (2, 1.0), (3, 2.0), (4, 3.0)]


def test_other_processes_write_nothing(tmp_path):
    log = MetricsLog(tmp_path, 0, enabled=False)
    log.write(1, "train", {"loss": 1.0})
    log.close()
    assert not list(tmp_path.iterdir())


def test_what_is_no_json_is_refused(tmp_path):
    log = MetricsLog(tmp_path, 0)
    with pytest.raises(UserError, match="step 3: cannot log eval metrics"):
        log.write(3, "eval", {"mean_score": float("nan")})
    log.close()


def step_metrics(loss, tokens=4.0, norm=1.0):
    values = {"loss": loss, "target_tokens": tokens, "gradient_norm": norm}
    return {name: jnp.float32(value) for name, value in values.items()}


def test_a_line_is_the_mean_since_the_last():
    window = Window()
    for loss in (1.0, 2.0, 6.0):
        window.add(step_metrics(loss))
    line = window.close()
    assert line["loss"] == 3.0 and line["target_tokens"] == 4.0
    assert line["time/target_tokens_per_s"] * line["time/step_s"] == pytest.approx(4.0)
    window.add(step_metrics(10.0))
    assert window.close()["loss"] == 10.0


@pytest.mark.parametrize("bad", [{"loss": float("nan")}, {"loss": 1.0, "norm": float("inf")}])
def test_a_loss_that_is_not_finite_ends_the_run(bad):
    window = Window()
    window.add(step_metrics(**bad))
    with pytest.raises(UserError, match="no longer finite"):
        window.rows()  # which a run that is stopped would save, with parameters of no use


def test_steps_of_a_run_that_was_stopped_are_in_the_mean_but_not_in_the_time(monkeypatch):
    clock = iter([100.0, 102.0, 102.0])
    monkeypatch.setattr(logs, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    window = Window([{"loss": 1.0, "target_tokens": 4.0, "gradient_norm": 1.0}] * 3)
    window.add(step_metrics(5.0, tokens=8.0))
    line = window.close()
    assert line["loss"] == 2.0
    assert line["time/step_s"] == 2.0 and line["time/target_tokens_per_s"] == 4.0


def test_steps_are_timed_after_one_that_was_compiled(monkeypatch):
    clock = iter([100.0, 160.0, 166.0, 166.0, 176.0, 180.0, 180.0])
    monkeypatch.setattr(logs, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    window = Window()
    window.add(step_metrics(1.0, tokens=100.0))
    window.compiled()
    for _ in range(2):
        window.add(step_metrics(4.0, tokens=6.0))
    line = window.close()
    assert line["loss"] == 3.0
    assert line["time/step_s"] == 3.0 and line["time/target_tokens_per_s"] == 2.0
    window.add(step_metrics(1.0, tokens=28.0))
    window.compiled()  # and no step follows
    line = window.close()
    assert line["time/step_s"] == 14.0 and line["time/target_tokens_per_s"] == 2.0
