"""`train --profile` writes a trace of the steps that were asked for."""

import gzip
import json

import pytest
from toy_run import bindings, finish, flags_of, start

from moe_jax.core.errors import UserError
from moe_jax.runs.profiling import Trace, parse_steps


def test_a_trace_has_the_steps(tmp_path):
    settings = {"TRAIN_STEPS": 6, "EVAL_PERIOD": 0, "CHECKPOINT_PERIOD": 6}
    flags = [*flags_of(bindings(tmp_path, **settings)), "--profile=3,4"]
    finish(start("train", flags))
    (path,) = (tmp_path / "profile").rglob("perfetto_trace.json.gz")
    assert list(path.parent.glob("*.xplane.pb"))  # TensorBoard's
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    steps = {event["args"]["step_num"] for event in events if event.get("name") == "train"}
    assert steps == {"3", "4"}


@pytest.mark.parametrize("words", [["3"], ["3", "2"], ["0", "2"], ["a", "b"], ["1", "2", "3"]])
def test_what_is_no_pair_of_steps(words):
    with pytest.raises(UserError, match="give the first and the last step, such as 10,12"):
        parse_steps(words)


@pytest.mark.parametrize("steps", [(1, 3), (10, 12), (4, 11)])
def test_steps_that_are_not_taken(steps, tmp_path):
    with pytest.raises(UserError, match=r"--profile=.*: this run takes steps 4 to 10"):
        Trace(tmp_path, steps, 4, 10)
