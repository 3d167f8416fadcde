"""The training loop leaves the device alone: what it reads from it, and when."""

import json
import re
import threading
from itertools import groupby

import jax
import pytest
from test_checkpoints import META, same, state
from toy_run import bindings, flags_of, start

from moe_jax.training import checkpoint_files
from moe_jax.training.checkpoints import Checkpoints, load_params

# Runs moe_jax.train; prints, in order, each batch that is put on the device, each step, and each
# function of the package that reads an array of the device.
RECORDING = """
import json, runpy, sys
import jax, jax.numpy as jnp
from moe_jax.runs import train_loop

events = []


def recorded(name, function):
    def run(*args, **more):
        events.append(name)
        return function(*args, **more)

    return run


def reading(function):
    def run(*args, **more):
        frame = sys._getframe(1)
        while frame and not frame.f_globals["__name__"].startswith("moe_jax."):
            frame = frame.f_back
        if frame:  # else a thread that writes a checkpoint
            events.append(frame.f_code.co_name)
        return function(*args, **more)

    return run


train_loop.LONG_S = 0
make = train_loop.make_train_step
train_loop.make_train_step = lambda *args: recorded("step", make(*args))
jax.make_array_from_process_local_data = recorded("put", jax.make_array_from_process_local_data)
Array = type(jnp.zeros(()))
for name in ("__array__", "__float__", "__int__", "__bool__", "__index__", "item", "tolist"):
    setattr(Array, name, reading(getattr(Array, name)))
try:
    runpy.run_module("moe_jax.train", run_name="__main__", alter_sys=True)
finally:
    print(json.dumps(events))
"""


# Runs moe_jax.train; prints the bytes of the state before the first step, and of all other arrays.
WEIGHING = """
import json, runpy
import jax
from moe_jax.runs import train_loop

make = train_loop.make_train_step


def weighing(*args):
    step, weights = make(*args), []

    def run(state, batch, rates):
        if not weights:
            own = {id(a): a.nbytes for a in jax.tree.leaves(state)}
            given = {id(a) for a in jax.tree.leaves((batch, rates))}
            rest = [a.nbytes for a in jax.live_arrays() if id(a) not in own.keys() | given]
            weights.extend((sum(own.values()), sum(rest)))
            print(json.dumps(weights), flush=True)
        return step(state, batch, rates)

    return run


train_loop.make_train_step = weighing
runpy.run_module("moe_jax.train", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("steps", [2, 3], ids=["first", "resumed"])
def test_nothing_but_the_state_is_on_the_devices(tmp_path_factory, steps):
    """Neither its initial parameters nor another state that a checkpoint was read into."""
    run = tmp_path_factory.getbasetemp() / "weighed"
    settings = {"TRAIN_STEPS": steps, "CHECKPOINT_PERIOD": 1}
    process = start("train", flags_of(bindings(run, **settings)), code=WEIGHING)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    state_bytes, others = json.loads(out.splitlines()[0])
    assert others < 0.1 * state_bytes


def test_metrics_are_read_one_step_late_and_nothing_else_is(tmp_path):
    settings = {"TRAIN_STEPS": 6, "RunConfig__log_period": 3}
    process = start("train", flags_of(bindings(tmp_path / "run", **settings)), code=RECORDING)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    events = json.loads(out.splitlines()[-1])
    found = [name for name, _ in groupby(events[events.index("put") :])]
    line = ["put", "step", "put", "step", "_read", "put", "step", "_read"]  # of three steps
    assert found[: 2 * len(line)] == 2 * line
    assert {"put", "step", "_read"}.isdisjoint(found[2 * len(line) :])
    assert "save" in found[2 * len(line) :]  # so what reads is seen
    assert len(re.findall(r"^compiled, and took the .* rows of 40 \+ 20 tokens", err, re.M)) == 1


def test_a_step_need_not_wait_for_the_disk(tmp_path, monkeypatch):
    """A checkpoint is written while training goes on, which gives up its arrays."""
    written, seal = threading.Event(), checkpoint_files.seal

    def late(path):
        assert written.wait(20)
        seal(path)

    monkeypatch.setattr(checkpoint_files, "seal", late)
    checkpoints = Checkpoints(tmp_path)
    begun, wanted = state(5, seed=5), state(5, seed=5)
    checkpoints.save(begun, META)
    jax.tree.map(lambda array: array.delete(), begun)
    assert checkpoint_files.steps(checkpoints.directory) == []
    written.set()
    checkpoints.wait()
    assert same(load_params(tmp_path)[0], wanted.params)
