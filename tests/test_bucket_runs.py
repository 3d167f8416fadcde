"""Whole runs in a bucket: the same files and metrics as on disk, whatever is killed or cut off."""

import json
import random
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from bucket_server import NAME, Bucket
from toy_run import bindings, finish, flags_of, metrics, start, start_together

from moe_jax.core import files
from moe_jax.core.errors import UserError
from moe_jax.data.representations import read_representations
from moe_jax.report.__main__ import main as report
from moe_jax.training.checkpoints import load_params

TOP = f"gs://{NAME}"
# Of aiohttp, about bodies of a megabyte. Python does not show it by default.
pytestmark = pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")
SETTINGS = {
    "TRAIN_STEPS": 24,
    "EVAL_PERIOD": 12,
    "CHECKPOINT_PERIOD": 6,
    "RouterConfig__selection": "gumbel_softmax_st",
    "RouterConfig__experts_per_layer": 1,
}


def relevant(names: set[str]) -> set[str]:
    """Without the numbers of a process and what Orbax names at random."""
    return {
        name.split("tfevents")[0]
        for name in names
        if name != ".lock" and "/d/" not in name and not name.endswith("commit_success.txt")
    }


def tree(directory: Path) -> set[str]:
    return {p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()}


def same(bucket: Bucket, name: str, directory: Path) -> None:
    """The bucket's directory and that of a disk hold the same run."""
    assert relevant(bucket.names(f"{name}/")) == relevant(tree(directory))
    copy = directory.parent / "copy"
    for path in bucket.names(f"{name}/"):
        files.write_bytes(copy / path, bucket.content(f"{name}/{path}"))
    assert metrics(copy) == metrics(directory)
    for path in sorted(tree(directory)):
        if path.startswith(("eval/", "routes")) or path in ("task_table.json", "runs.jsonl"):
            assert (copy / path).read_bytes() == (directory / path).read_bytes(), path
    here, there = load_params(directory)[0], load_params(f"{TOP}/{name}")[0]
    for one, other in zip(jax.tree.leaves(here), jax.tree.leaves(there), strict=True):
        np.testing.assert_array_equal(one, other)


def at_request(bucket: Bucket, number: int, act: Callable[[], object]) -> list[int]:
    """Lets the bucket act before it answers so many more requests; the list of those it gets."""
    asked: list[int] = []

    def before(count: int) -> None:
        asked.append(count)
        if len(asked) == number:
            act()

    bucket.before = before
    return asked


def killed_after(bucket: Bucket, process: subprocess.Popen, requests: int, number: int) -> int:
    """Sends a signal when the bucket gets so many requests. The exit code."""
    at_request(bucket, requests, lambda: process.send_signal(number))
    try:
        process.communicate(timeout=300)
    finally:
        bucket.before = lambda count: None
    return process.returncode


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run on disk that nothing has interrupted."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    finish(start("train", flags_of(bindings(directory, **SETTINGS))))
    return directory


def test_a_run_that_is_killed_goes_on_as_on_disk(top, bucket, whole, tmp_path):
    arguments = flags_of(bindings(f"{top}/run", **SETTINGS))
    assert killed_after(bucket, start("train", arguments), 120, signal.SIGKILL) == -9
    finish(start("train", arguments))
    same(bucket, f"{top}/run".removeprefix(f"{TOP}/"), whole)
    arguments = ["--permutations=9", "--output"]
    report(["--run", f"run={top}/run", *arguments, f"{top}/report"])
    report(["--run", f"run={whole}", *arguments, str(tmp_path / "report")])
    here, there = (files.read_json(f"{d}/report/report.json") for d in (tmp_path, top))
    assert here["findings"] == there["findings"]
    assert files.read_text(f"{top}/report/index.html").startswith("<!DOCTYPE html>")


def few_shot(place: str | Path, **settings) -> list[str]:
    """Flags of `finetune` that adapts the runs `dense` and `moe` of a directory."""
    lines = bindings(
        f"{place}/few_shot",
        MIXTURE_OR_TASK_NAME="toy_unseen", VocabularyConfig__trained_on="toy_train",
        DENSE_DIR=f"{place}/dense", MOE_DIR=f"{place}/moe",
        FinetuneConfig__learning_rates=(1e-3, 1e-2), FinetuneConfig__batch_sizes=(4,),
        FinetuneConfig__seeds=(13,), FinetuneConfig__steps=3, **settings,
    )  # fmt: skip
    return flags_of([line for line in lines if not line.startswith(("TRAIN", "Model"))])


def findings(place: str | Path) -> dict:
    """What a report about the runs of a directory says."""
    arguments = ["--run", f"dense={place}/dense", "--run", f"moe={place}/moe", "--permutations=9"]
    arguments += ["--finetune", f"{place}/few_shot", "--output", f"{place}/report"]
    report(arguments)
    return files.read_json(f"{place}/report/report.json")["findings"]


def half_written(bucket: Bucket, name: str) -> list[str]:
    """The files and checkpoints of a run that a reader would take, and are not whole."""
    there, found = bucket.names(f"{name}/"), []
    for path in there:
        if path.endswith(".json"):
            try:
                json.loads(bucket.content(f"{name}/{path}"))
            except ValueError:
                found.append(path)
        if match := re.fullmatch(r"(checkpoints/\d+/)commit_success.txt", path):
            sums = json.loads(bucket.content(f"{name}/{match[1]}checksums.json"))["files"]
            found += [file for file in sums if match[1] + file not in there]
    return found


@pytest.mark.slow
def test_ten_random_moments_scores_few_shot_and_report(top, bucket, whole, tmp_path):
    """Whatever a reader finds in between is that of a step which an uninterrupted run saves."""
    disk = tmp_path / "disk"
    shutil.copytree(whole, disk / "moe")
    every = {"CHECKPOINT_PERIOD": 1, "RunConfig__keep_checkpoints": 100}
    finish(start("train", flags_of(bindings(tmp_path / "every", **SETTINGS | every))))
    arguments = flags_of(bindings(f"{top}/moe", **SETTINGS))
    name = f"{top}/moe".removeprefix(f"{TOP}/")
    rng, ends, steps = random.Random(0), [], []
    for turn in range(10):
        number = signal.SIGKILL if turn % 2 else signal.SIGTERM
        requests = rng.randrange(10, 100)
        ends.append(killed_after(bucket, start("train", arguments), requests, number))
        assert half_written(bucket, name) == []
        try:
            params, meta = load_params(f"{top}/moe")
        except UserError as e:
            assert str(e).startswith(f"no checkpoint in {top}/moe")
            continue
        steps.append(meta["step"])
        expected, _ = load_params(tmp_path / "every" / "checkpoints" / str(meta["step"]))
        for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(one, other)
    print(f"exit codes {ends}, checkpoints read {steps}")
    assert set(ends) <= {-signal.SIGKILL, 75, 0} and ends.count(0) < 5 and steps == sorted(steps)
    finish(start("train", arguments))
    dense = SETTINGS | {"ModelConfig__experts": 1, "TRAIN_STEPS": 4}
    for place in (disk, top):
        finish(start("eval", [f"--gin.MODEL_DIR={place}/moe"]))
        finish(start("train", flags_of(bindings(f"{place}/dense", **dense))))
    same(bucket, name, disk / "moe")
    finish(start("finetune", few_shot(disk)))
    for requests, number in ((130, signal.SIGTERM), (160, signal.SIGKILL)):
        code = killed_after(bucket, start("finetune", few_shot(top)), requests, number)
        print(f"few-shot ended with {code}")
        assert code in (0, 75, -signal.SIGKILL)
    finish(start("finetune", few_shot(top)))
    for file in ("few_shot/runs.jsonl", "few_shot/arg.json"):
        assert files.read_text(f"{top}/{file}") == files.read_text(disk / file)
    assert findings(top) == findings(disk)


@pytest.mark.slow
def test_everything_in_a_bucket(top, bucket, tmp_path):
    """Data prepared there, two runs, few-shot adaptation that is cut short, a report."""
    made = {}
    for place in (str(tmp_path / "disk"), top):
        for name, settings in {"dense": {"ModelConfig__experts": 1}, "moe": {}}.items():
            lines = bindings(
                f"{place}/{name}", TRAIN_STEPS=4, CACHE_DIR=f"{place}/cache", **settings
            )
            finish(start("train", flags_of(lines)))
        arguments = few_shot(place, CACHE_DIR=f"{place}/cache")
        finish(start("finetune", arguments))
        rows = list(files.read_jsonl(f"{place}/few_shot/runs.jsonl"))
        files.write_jsonl(f"{place}/few_shot/runs.jsonl", rows[:3])
        finish(start("finetune", arguments))
        represent = ["--gin.represent.output=" + f"{place}/r.npz", "--gin.represent.examples=4"]
        finish(start("represent", [f"--gin.MODEL_DIR={place}/dense", *represent]))
        made[place] = (
            files.read_text(f"{place}/few_shot/runs.jsonl"),
            files.read_json(f"{place}/few_shot/arg.json"),
            read_representations(f"{place}/r.npz", ["toy_copy"], None).tolist(),
        )
    disk, there = made.values()
    assert disk == there


@pytest.mark.slow
def test_two_processes_write_one_run(top, bucket, tmp_path):
    """Each writes its shards of every checkpoint; one is killed, and both go on."""
    settings = SETTINGS | {"MeshConfig__fsdp": 2}
    for process in start_together(2, flags_of(bindings(tmp_path / "disk", **settings))):
        finish(process)
    arguments = flags_of(bindings(f"{top}/run", **settings))
    for requests, index in ((200, 1), (150, 0)):
        processes = start_together(2, arguments)
        at_request(bucket, requests, processes[index].kill)
        ends = [process.communicate(timeout=300)[1] for process in processes]
        bucket.before = lambda count: None
        assert processes[index].returncode == -signal.SIGKILL
        assert processes[1 - index].returncode == 75, ends
        assert f"process {index} of 2" in ends[1 - index].splitlines()[-1]
        assert half_written(bucket, f"{top}/run".removeprefix(f"{TOP}/")) == []
    for process in start_together(2, arguments):
        finish(process)
    name = f"{top}/run".removeprefix(f"{TOP}/")
    for index in range(2):
        assert any(f"params/ocdbt.process_{index}/" in path for path in bucket.names(f"{name}/"))
    same(bucket, name, tmp_path / "disk")


# ------------------------------------------------------------------------------ outages


def stop_soon(bucket: Bucket) -> None:
    """Stops it when the request at hand is answered."""
    threading.Thread(target=bucket.stop).start()


@pytest.mark.slow
def test_a_run_waits_for_a_bucket_that_comes_back(top, bucket, whole):
    process = start("train", flags_of(bindings(f"{top}/run", **SETTINGS)))
    stopped = threading.Event()
    at_request(bucket, 150, lambda: (stop_soon(bucket), stopped.set()))
    assert stopped.wait(200)
    bucket.before = lambda count: None
    try:
        # The outage may begin just after a question, and the line comes 10 s after the next one.
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(25)
    finally:
        bucket.start()
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert re.search(rf"^{TOP} is out of reach, waiting \(10 s\): Connection refused$", err, re.M)
    assert f"{TOP} answers again" in err
    same(bucket, f"{top}/run".removeprefix(f"{TOP}/"), whole)


@pytest.mark.slow
def test_a_run_ends_when_its_bucket_stays_away_and_goes_on_later(top, bucket, whole):
    arguments = flags_of(bindings(f"{top}/run", **SETTINGS))
    process = start("train", arguments)
    at_request(bucket, 150, lambda: stop_soon(bucket))
    try:
        _, err = process.communicate(timeout=300)
    finally:
        bucket.before = lambda count: None
        bucket.start()
    assert process.returncode == 75, err
    assert err.splitlines()[-1].startswith("error: ") and "Traceback" not in err
    assert err.count("is out of reach, waiting") >= 2
    assert half_written(bucket, f"{top}/run".removeprefix(f"{TOP}/")) == []
    finish(start("train", arguments))
    same(bucket, f"{top}/run".removeprefix(f"{TOP}/"), whole)
