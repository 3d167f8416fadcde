"""Files, locks, checkpoints and the cache in a bucket: whole or absent, as on disk."""

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import gin
import jax.numpy as jnp
import numpy as np
import pytest
from toy import NAMES, TASKS, VOCABULARY, toy_cache

from moe_jax.core import checksums, files, leases, paths
from moe_jax.core.errors import UserError
from moe_jax.core.processes import lock
from moe_jax.data import mirror
from moe_jax.data.prepared import look_up
from moe_jax.data.representations import read_representations
from moe_jax.data.request import Request
from moe_jax.runs import gin_files
from moe_jax.training.checkpoints import Checkpoints, load_params
from moe_jax.training.logs import MetricsLog
from moe_jax.training.step import TrainState

pytest.importorskip("gcsfs", reason="buckets need gcsfs: the extra `gcs`")

TOP = "gs://toys"
# Of aiohttp, about bodies of a megabyte. Python does not show it by default.
pytestmark = pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")


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
    gin_files.parse([f"{top}/gin/a.gin"], [], ["."])
    assert gin.query_parameter("TRAIN_STEPS/macro.value") == 7
    assert gin.query_parameter("SEED/macro.value") == 5
    assert str(gin_files.find("b.gin", [".", f"{top}/gin"])) == f"{top}/gin/b.gin"
    with pytest.raises(UserError, match=r"no gin file 'c.gin'"):
        gin_files.find("c.gin", [f"{top}/gin"])
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


def test_a_lock_is_renewed_again_after_its_store_was_out_of_reach(top, monkeypatch):
    """The answer to a write is lost, and then the connection in the read that looks after it."""
    open_store = leases.tensorstore.KvStore.open
    calls = []

    class Store:
        def __init__(self, *arguments):
            self._store = open_store(*arguments).result()

        def result(self):
            return self

        def write(self, *arguments, **named):
            done = self._store.write(*arguments, **named)
            done.result()
            calls.append("write")
            if calls.count("write") == 2:  # the first takes the lock
                raise ValueError("UNAVAILABLE: no answer")
            return done

        def read(self, *arguments):
            calls.append("read")
            if calls.count("read") == 2:
                raise OSError("no route to host")
            return self._store.read(*arguments)

    monkeypatch.setattr(leases.tensorstore, "KvStore", Store)
    Store.open = Store
    monkeypatch.setattr(leases, "RENEWAL", 0.1)
    with lock(top):
        end = time.monotonic() + 20
        while calls.count("write") < 6 and time.monotonic() < end:
            time.sleep(0.05)
        assert calls[:8] == ["read", "write", "write", "write", "read", "write", "read", "write"]
    assert not paths.parse(f"{top}/.lock").exists()


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


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_here_is_no_damage_there(number, tmp_path, monkeypatch):
    source = tmp_path / "source"  # in place of a bucket
    files.write_text(source / "file", "content")
    checksums.seal(source)

    def fail(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match=f"cannot write .*: {os.strerror(number)}"):
        mirror._fetch_directory(source, tmp_path / "copy")
    assert checksums.is_sealed(source) and not (tmp_path / "copy").exists()
