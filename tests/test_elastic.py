"""Runs that are stopped anywhere and go on elsewhere: the same examples, the same losses.

Every step writes down which examples it sees, group by group, on whatever device they are.
"""

import json
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_run import bindings, flags_of, metrics, start_together

# All sources of randomness are on. The mathematics is the same for any TRAIN_STEPS; Adam's usual
# epsilon would blow up gradients that are zero but for rounding.
SETTINGS = {
    "RouterConfig__selection": "gumbel_softmax_st",
    "RouterConfig__experts_per_layer": 1,
    "RouterConfig__exploration_epsilon": 0.2,
    "ModelConfig__dropout_rate": 0.1,
    "OptimizerConfig__decay": "constant",
    "OptimizerConfig__warmup_fraction": 0.0,
    "OptimizerConfig__epsilon": 1e-2,
    "RunConfig__log_period": 1,
}
# Trains, writes down what each step sees, and one process sends itself a signal before a step.
RECORDING = """
import hashlib, json, os, runpy, sys
import jax
import numpy as np
from moe_jax.runs import train_loop

seen = sys.argv.pop(1)
last, number, who = (int(sys.argv.pop(1)) for _ in range(3))
make_train_step = train_loop.make_train_step

def recording(*arguments):
    train_step = make_train_step(*arguments)

    def step(state, batch, rates):
        groups = {}
        for name in sorted(batch):
            for shard in batch[name].addressable_shards:
                first = shard.index[0].start or 0
                for group, array in enumerate(np.asarray(shard.data), first):
                    groups.setdefault(group, {}).setdefault(name, array.tobytes())
        at = int(state.step) + 1
        with open(f"{seen}.{jax.process_index()}", "a") as file:
            for group, arrays in groups.items():
                digest = hashlib.sha256(b"".join(arrays.values())).hexdigest()
                print(json.dumps([at, group, digest]), file=file)
        if at == last and number and jax.process_index() == who:
            os.kill(os.getpid(), number)
        return train_step(state, batch, rates)

    return step

train_loop.make_train_step = recording
runpy.run_module("moe_jax.train", run_name="__main__", alter_sys=True)
"""
MESHES = [  # with their devices
    ({}, 1),
    ({"fsdp": 2}, 2),
    ({"expert": 2}, 2),
    ({"model": 2}, 2),
    ({"fsdp": 2, "expert": 2}, 4),
    ({"data": 2, "fsdp": 2, "model": 2}, 8),
]
Seen = dict[int, list[str]]  # step -> digests of its groups, in order


def train(
    model_dir: Path, settings: dict, mesh: tuple[dict, int] = MESHES[0], processes: int = 1,
    last: int = 0, number: int = 0, who: int = -1,
) -> Seen:  # fmt: skip
    """Starts a run, which ends by itself, or by a signal to one process before step `last`.

    Returns:
        What its steps saw.
    """
    who %= processes
    axes, devices = mesh
    settings = {**SETTINGS, **settings, **{f"MeshConfig__{k}": v for k, v in axes.items()}}
    seen = model_dir.with_name(f"{model_dir.name}.seen")
    arguments = [str(seen), str(last), str(int(number)), str(who)]
    arguments += flags_of(bindings(model_dir, **settings))
    started = start_together(processes, arguments, devices=devices // processes, code=RECORDING)
    for index, process in enumerate(started):
        _, err = process.communicate(timeout=600)
        killed = number == signal.SIGKILL and index == who
        assert process.returncode == (-number if killed else 75 if number else 0), err[-3000:]
    found: dict[int, dict[int, str]] = {}
    for path in model_dir.parent.glob(f"{seen.name}.*"):
        for step, group, digest in map(json.loads, path.read_text().splitlines()):
            # Processes that hold the same group see the same examples.
            assert found.setdefault(step, {}).setdefault(group, digest) == digest
        path.unlink()
    # A process that was killed may not have said all that it was about to see.
    all_groups = max(map(len, found.values()), default=0)
    return {
        step: [groups[g] for g in sorted(groups)]
        for step, groups in found.items()
        if len(groups) == all_groups
    }


def losses(model_dir: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in metrics(model_dir)}


def check_losses(model_dir: Path, like: Path) -> None:
    """Compares the losses of two runs, step by step."""
    ours, theirs = losses(model_dir), losses(like)
    assert ours.keys() == theirs.keys()
    for step in theirs:
        np.testing.assert_allclose(ours[step], theirs[step], rtol=1e-5, err_msg=f"step {step}")


def in_order(seen: Seen) -> list[str]:
    return [group for step in sorted(seen) for group in seen[step]]


def check(seed: int, tmp_path: Path, steps: int, stops: int, **own: Any) -> None:
    """Compares a run that is stopped in some random places with one that is not.

    Args:
        own: settings of both.
    """
    rng = random.Random(seed)
    whole, model_dir = tmp_path / "whole", tmp_path / "run"
    wanted = train(whole, {**own, "TRAIN_STEPS": steps})
    assert sorted(wanted) == list(range(1, steps + 1))
    seen: Seen = {}
    # Not next to each other: a run that is asked to stop does one step more.
    for stop in (*sorted(rng.sample(range(2, steps - 1, 3), stops)), steps):
        how = rng.choice([0, signal.SIGTERM, signal.SIGKILL]) if stop < steps else 0
        settings = {
            **own,
            "TRAIN_STEPS": steps if how else stop,
            "CHECKPOINT_PERIOD": rng.randint(1, 4),
            "StepConfig__groups_at_once": rng.choice([0, 1]),
            "ModelConfig__kept_activations": rng.choice(["all", "inputs"]),
        }
        mesh = rng.choice(MESHES)
        processes = rng.randint(1, min(2, mesh[1]))
        print(f"until {stop}, {how!r}: {settings}, {mesh}, {processes} processes")
        now = train(model_dir, settings, mesh, processes, stop, how)
        # What a kill has undone is done again.
        first = min(now, default=steps + 1)
        seen = {step: groups for step, groups in seen.items() if step < first} | now
        assert sorted(seen) == list(range(1, max(seen) + 1))
        assert seen == {step: wanted[step] for step in seen}
    check_losses(model_dir, whole)
    assert losses(whole).keys() == wanted.keys()


def test_a_run_stopped_anywhere_goes_on_elsewhere(tmp_path):
    check(1, tmp_path, steps=8, stops=1)


@pytest.mark.slow
@pytest.mark.parametrize("shapes", [1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_many_runs_stopped_anywhere_go_on_elsewhere(seed, shapes, tmp_path):
    check(seed, tmp_path, steps=24, stops=4, DataConfig__row_shapes=shapes)


@pytest.mark.slow
@pytest.mark.parametrize("who", [0, 1])
def test_either_of_two_processes_is_killed_and_1_2_or_4_go_on(who, tmp_path):
    settings = {"TRAIN_STEPS": 8, "CHECKPOINT_PERIOD": 2}
    wanted = train(tmp_path / "whole", settings)
    killed = tmp_path / "killed"
    train(killed, settings, MESHES[1], 2, last=6, number=signal.SIGKILL, who=who)
    for processes, mesh in ((1, MESHES[0]), (2, MESHES[1]), (4, MESHES[4])):
        run = tmp_path / f"on_{processes}"
        shutil.copytree(killed, run)
        now = train(run, settings, mesh, processes)
        assert min(now) in (3, 5)  # a checkpoint takes a moment to be whole
        assert now == {step: wanted[step] for step in range(min(now), 9)}
        check_losses(run, tmp_path / "whole")


@pytest.mark.slow
def test_with_another_batch_size_the_same_groups_follow(tmp_path):
    """Whatever else changes, and wherever it is stopped."""
    wanted = in_order(train(tmp_path / "whole", {"TRAIN_STEPS": 32}))
    run, seen = tmp_path / "run", {}
    for stop, size, mesh, processes, how in (
        (4, 16, MESHES[1], 2, signal.SIGTERM),
        (7, 8, MESHES[0], 1, signal.SIGKILL),
        (9, 24, MESHES[3], 1, 0),
        (12, 8, MESHES[2], 2, 0),
    ):
        settings = {"TRAIN_STEPS": 12 if how else stop, "BATCH_SIZE": size}
        settings["CHECKPOINT_PERIOD"] = 2
        now = train(run, settings, mesh, processes, stop, how)
        first = min(now)
        seen = {step: groups for step, groups in seen.items() if step < first} | now
        assert {*map(len, now.values())} == {size // 2}
        assert in_order(seen) == wanted[: len(in_order(seen))]
    assert sorted(seen) == list(range(1, 13))
