"""Runs in a bucket: the same files and metrics as on disk, whatever is killed."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from toy import NAMES, TASKS, VOCABULARY, toy_cache
from toy_run import bindings, finish, flags_of, metrics, start

from moe_jax.core import checksums, files, leases, paths
from moe_jax.core.errors import UserError
from moe_jax.core.processes import lock
from moe_jax.data import mirror
from moe_jax.data.cache import Request
from moe_jax.data.prepared import look_up
from moe_jax.data.representations import read_representations
from moe_jax.report.__main__ import main as report
from moe_jax.runs import flags
from moe_jax.training.checkpoints import Checkpoints, load_params
from moe_jax.training.logs import MetricsLog
from moe_jax.training.step import TrainState

pytest.importorskip("gcsfs", reason="buckets need gcsfs: the extra `gcs`")
pytest.importorskip("gcp_storage_emulator", reason="the emulator is in the extra `test`")

from bucket_server import NAME, Bucket

TOP = f"gs://{NAME}"
# Of aiohttp, about bodies of a megabyte. Python does not show it by default.
pytestmark = pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")


@pytest.fixture(scope="module")
def bucket():
    """Clients keep the address that they first had: so it is one for all tests here."""
    with Bucket() as found, pytest.MonkeyPatch.context() as patch:
        for name, value in found.environment.items():
            patch.setenv(name, value)
        yield found


@pytest.fixture
def top(bucket, request, tmp_path, monkeypatch) -> str:
    """A test's own directory of the bucket; copies of buckets are in its temporary directory."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return f"{TOP}/{request.node.name.split('[')[0]}"


# ------------------------------------------------------------------------------ files


def test_files(top, bucket):
    path = f"{top}/a/b.json"
    with pytest.raises(UserError, match=f"^cannot read {path}: No such file or directory$"):
        files.read_json(path)
    for value in ({"x": [1, "é"]}, {}, {"long": "x" * 3_000_000}):
        files.write_json(path, value)
        assert files.read_json(path) == value
        assert json.loads(bucket.content(path.removeprefix(f"{TOP}/"))) == value
    rows = [{"n": n} for n in range(5)]
    files.append_jsonl(f"{top}/rows.jsonl", rows[:2])
    files.append_jsonl(f"{top}/rows.jsonl", rows[2:])
    assert list(files.read_jsonl(f"{top}/rows.jsonl")) == rows
    directory = paths.parse(top)
    assert sorted(path.name for path in directory.iterdir()) == ["a", "rows.jsonl"]
    paths.remove_tree(directory / "a")
    paths.remove_tree(directory / "a")
    assert [path.name for path in directory.iterdir()] == ["rows.jsonl"]


def test_a_bucket_that_is_not_there(bucket):
    with pytest.raises(UserError, match=r"^cannot write gs://other/a: No such file or directory$"):
        files.write_text("gs://other/a", "")
    for path in ("gs://", "gs://B/x", "gs:/bucket/x"):
        with pytest.raises(UserError, match="gs://BUCKET/PATH"):
            paths.parse(path)


def test_gin_files_and_representations(top):
    files.write_text(f"{top}/gin/a.gin", "include 'b.gin'\nSEED = 5\n")
    files.write_text(f"{top}/gin/b.gin", "TRAIN_STEPS = 7\n")
    text = flags._with_includes(flags._find(f"{top}/gin/a.gin", ["."]), ["."])
    assert text.split() == ["TRAIN_STEPS", "=", "7", "SEED", "=", "5"]
    assert str(flags._find("b.gin", [".", f"{top}/gin"])) == f"{top}/gin/b.gin"
    with pytest.raises(UserError, match=r"no gin file 'c.gin'"):
        flags._find("c.gin", [f"{top}/gin"])
    files.write_json(f"{top}/r.json", {"a": [1.0, 2.0], "b": [3.0, 4.0]})
    np.testing.assert_array_equal(read_representations(f"{top}/r.json", ["b"], 2), [[3, 4]])


def test_metrics_are_there_when_they_are_published(top, monkeypatch):
    directory = paths.parse(top)
    log = MetricsLog(top, 0)
    log.write(1, "train", {"loss": 2.0})  # the first at once, the next half a minute later
    log.write(2, "eval", {"mean_score": 0.5})
    assert [row["step"] for row in files.read_jsonl(f"{top}/metrics.jsonl")] == [1]
    log.publish()
    assert [row["step"] for row in files.read_jsonl(f"{top}/metrics.jsonl")] == [1, 2]
    log.close()
    files.append_jsonl(f"{top}/metrics.jsonl", [{"step": 3, "kind": "train", "loss": 9.0}])
    log = MetricsLog(top, 2)  # goes on from the checkpoint at step 2
    log.write(3, "train", {"loss": 1.0})
    log.close()
    assert log.scores == {2: 0.5}
    assert [row["step"] for row in files.read_jsonl(f"{top}/metrics.jsonl")] == [1, 2, 3]
    assert len(list(directory.glob("events.out.tfevents.*"))) == 1


# ------------------------------------------------------------------------------ locks


def test_a_lock_has_one_holder_and_goes_with_it(top, monkeypatch):
    monkeypatch.setattr(leases, "RENEWAL", 0.2)
    said = f"{top} is in use by process {os.getpid()} on"
    with lock(top):
        with pytest.raises(UserError, match=said), lock(top):
            pass
        assert paths.parse(f"{top}/.lock").exists()
    assert not paths.parse(f"{top}/.lock").exists()


def test_the_lock_of_a_process_that_was_killed_is_free(top):
    code = f"""
import time
from moe_jax.core.processes import lock
with lock({top!r}):
    print("held", flush=True)
    time.sleep(100)
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        process.kill()
    assert paths.parse(f"{top}/.lock").exists()
    with lock(top):
        pass
    assert not paths.parse(f"{top}/.lock").exists()


@pytest.mark.parametrize("wait", [False, True])
def test_the_lock_of_another_machine_is_free_when_it_is_no_longer_renewed(
    top, wait, monkeypatch, capsys
):
    monkeypatch.setattr(leases, "EXPIRY", 0.5)
    files.write_text(f"{top}/.lock", "process 1 on elsewhere\nboot\nid")
    with lock(top, wait):
        assert f"process {os.getpid()}" in files.read_text(f"{top}/.lock")
    assert "waiting for process 1 on elsewhere" in capsys.readouterr().err


# ------------------------------------------------------------------------------ checkpoints


def state(step: int) -> TrainState:
    numbers = np.random.default_rng(step).normal(size=(4, 3)).astype(np.float32)
    return TrainState(
        jnp.int32(step), {"a": {"kernel": jnp.asarray(numbers)}}, {"m": jnp.asarray(numbers[0])}
    )


def test_checkpoints(top, bucket, capsys):
    """The latest two and the best are kept; what is unfinished or damaged is not read."""
    name = top.removeprefix(f"{TOP}/")

    def there() -> set[str]:
        return {path.split("/")[0] for path in bucket.names(f"{name}/checkpoints/")}

    with Checkpoints(top, keep=2) as checkpoints:
        checkpoints.scores = {1: 0.9, 2: 0.1}
        for step in (1, 2, 3, 4):
            checkpoints.save(state(step), {"tasks": ["a"]})
    assert there() == {"1", "3", "4"}
    directory = checkpoints.directory
    (directory / "4" / "commit_success.txt").unlink()  # as if it was killed just before
    params, meta = load_params(top)
    assert meta["step"] == 3
    np.testing.assert_array_equal(params["a"]["kernel"], state(3).params["a"]["kernel"])
    checkpoints = Checkpoints(top, keep=2)
    assert there() == {"1", "3"}
    data = next(path for path in bucket.names(f"{name}/checkpoints/3/") if "params/d/" in path)
    content = bytearray(files.read_bytes(directory / "3" / data))
    content[len(content) // 2] ^= 1
    files.write_bytes(directory / "3" / data, bytes(content))
    restored, meta = checkpoints.restore_latest(state(0))
    assert meta["step"] == restored.step == 1 and there() == {"1", "3.damaged"}
    np.testing.assert_array_equal(restored.params["a"]["kernel"], state(1).params["a"]["kernel"])
    assert f"set aside as {directory}/3.damaged: {directory}/3/{data}" in capsys.readouterr().err
    (directory / "1" / "optimizer" / "_METADATA").unlink()
    with pytest.raises(UserError, match="is whole: they were set aside"):
        checkpoints.restore_latest(state(0))


# ------------------------------------------------------------------------------ the cache


def test_a_cache_is_copied_once_and_checked(top, bucket, tmp_path, monkeypatch, capsys):
    request = Request.make(NAMES, TASKS, VOCABULARY)
    here = mirror.here(top)
    here.parent.mkdir(parents=True)
    here.symlink_to(toy_cache())  # as if it had been prepared on this host
    mirror.publish(top, request)
    assert mirror.fetch(toy_cache(), request) == toy_cache()
    name = top.removeprefix(f"{TOP}/")
    local = {
        path.relative_to(toy_cache()).as_posix()
        for path in toy_cache().rglob("*")
        if path.is_file() and path.name != ".lock"
    }
    assert bucket.names(f"{name}/") == local

    monkeypatch.setenv("HOME", str(tmp_path / "another host"))
    found, asked = look_up(top, request), []
    mixture = found["toy_train"]
    assert None not in found.values()
    assert mixture.fingerprint == look_up(toy_cache(), request)["toy_train"].fingerprint
    example = mixture.tasks[0].records("train")[0]
    assert Path(mixture.tasks[0].directory).is_relative_to(tmp_path) and example.inputs_text
    monkeypatch.setattr(bucket, "before", asked.append)
    assert None not in look_up(top, request).values()
    assert len(asked) < 60  # its files are not fetched again

    files.write_bytes(request.path(paths.parse(top), "toy_unseen"), b"{")
    assert [name for name, found in look_up(top, request).items() if found is None] == [
        "toy_unseen"
    ]
    assert "damaged, and prepared again" in capsys.readouterr().err

    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    mirror.publish(top, request)  # as whoever prepares it again does

    monkeypatch.setenv("HOME", str(tmp_path / "third host"))
    shard = next(path for path in bucket.names(f"{name}/") if path.endswith(".array_record"))
    files.write_bytes(f"{top}/{shard}", b"damaged")
    assert None in look_up(top, request).values()
    assert f"damaged, and prepared again: {top}/{shard}" in capsys.readouterr().err
    directory = paths.parse(top) / shard
    assert not checksums.is_sealed(directory.parent)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    mirror.publish(top, request)
    monkeypatch.setenv("HOME", str(tmp_path / "fourth host"))
    assert None not in look_up(top, request).values()


# ------------------------------------------------------------------------------ whole runs

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
    for one, other in zip(leaves(here), leaves(there), strict=True):
        np.testing.assert_array_equal(one, other)


def leaves(params) -> list:
    import jax

    return jax.tree.leaves(params)


def killed_after(bucket: Bucket, arguments: list[str], requests: int, number: int) -> int:
    """Starts training; sends a signal when the bucket gets so many requests. The exit code."""
    process = start("train", arguments)
    first = []

    def before(count: int) -> None:
        first.append(count)
        if len(first) == requests:
            process.send_signal(number)

    bucket.before = before
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
    assert killed_after(bucket, arguments, 120, signal.SIGKILL) == -signal.SIGKILL
    finish(start("train", arguments))
    same(bucket, f"{top}/run".removeprefix(f"{TOP}/"), whole)
    arguments = ["--permutations=9", "--output"]
    assert report(["--run", f"run={top}/run", *arguments, f"{top}/report"]) == 0
    assert report(["--run", f"run={whole}", *arguments, str(tmp_path / "report")]) == 0
    here, there = (files.read_json(f"{d}/report/report.json") for d in (tmp_path, top))
    assert here["findings"] == there["findings"]
    assert files.read_text(f"{top}/report/index.html").startswith("<!DOCTYPE html>")


@pytest.mark.slow
def test_ten_random_moments_and_scores(top, bucket, whole, tmp_path):
    disk = shutil.copytree(whole, tmp_path / "disk")
    arguments = flags_of(bindings(f"{top}/run", **SETTINGS))
    rng, ends = random.Random(0), []
    for turn in range(10):
        number = signal.SIGKILL if turn % 2 else signal.SIGTERM
        ends.append(killed_after(bucket, arguments, rng.randrange(20, 250), number))
    assert set(ends) <= {-signal.SIGKILL, 75, 0} and ends.count(0) < 5
    finish(start("train", arguments))
    for run in (disk, f"{top}/run"):
        finish(start("eval", [f"--gin.MODEL_DIR={run}"]))
    same(bucket, f"{top}/run".removeprefix(f"{TOP}/"), disk)


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
        lines = bindings(
            f"{place}/few_shot",
            MIXTURE_OR_TASK_NAME="toy_unseen", VocabularyConfig__trained_on="toy_train",
            DENSE_DIR=f"{place}/dense", MOE_DIR=f"{place}/moe", CACHE_DIR=f"{place}/cache",
            FinetuneConfig__learning_rates=(1e-3, 1e-2), FinetuneConfig__batch_sizes=(4,),
            FinetuneConfig__seeds=(13,), FinetuneConfig__steps=3,
        )  # fmt: skip
        lines = [line for line in lines if not line.startswith(("TRAIN", "Model"))]
        finish(start("finetune", flags_of(lines)))
        rows = list(files.read_jsonl(f"{place}/few_shot/runs.jsonl"))
        files.write_jsonl(f"{place}/few_shot/runs.jsonl", rows[:3])
        finish(start("finetune", flags_of(lines)))
        represent = ["--gin.represent.output=" + f"{place}/r.npz", "--gin.represent.examples=4"]
        finish(start("represent", [f"--gin.MODEL_DIR={place}/dense", *represent]))
        made[place] = (
            files.read_text(f"{place}/few_shot/runs.jsonl"),
            files.read_json(f"{place}/few_shot/arg.json"),
            read_representations(f"{place}/r.npz", ["toy_copy"], None).tolist(),
        )
    disk, there = made.values()
    assert disk == there
