"""A disk that is full at some moment of a run: one line says so, and with room the run goes on.

A file system of its own is mounted in memory, and filled but for some pages. MOMENTS in the
environment is another number of them than 20 for each directory.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import TABLES
from test_kills import LEFT, Job, evaluate, finetune, prepare, train
from toy_run import finish, start

from moe_jax.core import checksums

pytestmark = pytest.mark.slow
MOMENTS = int(os.environ.get("MOMENTS", "20"))
PAGE = 4096
SIZE = 64 << 20


@pytest.fixture
def disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(place)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as e:
        pytest.skip(f"mount: {e}")
    if done.returncode:
        pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def model_dir(root: Path) -> Job:
    return train(root, TRAIN_STEPS=12, EVAL_PERIOD=6)


def convert(root: Path) -> Job:
    job, out = train(root, TRAIN_STEPS=2, EVAL_PERIOD=0), root / "hf"
    finish(start(job.program, job.arguments))

    def digests():
        return {path.name: checksums.of_file(path) for path in out.iterdir()}

    arguments = ["to-hf", str(root / "run"), str(out), "--average"]
    return Job("convert", arguments, out, lambda: 0, digests)


@pytest.mark.parametrize("make", [model_dir, prepare, evaluate, finetune, convert])
def test_a_full_disk(make, disk, request):
    """MODEL_DIR while training, CACHE_DIR, and the outputs of the other commands."""
    job = make(disk)
    begin = pages_left(disk)
    finish(start(job.program, job.arguments))
    expected, need = job.result(), begin - pages_left(disk)
    assert need > 1
    for moment in range(MOMENTS):
        shutil.rmtree(job.made)
        filler = disk / "filler"
        with open(filler, "wb") as f:  # all pages but some of those that are needed
            os.posix_fallocate(f.fileno(), 0, (pages_left(disk) - need * moment // MOMENTS) * PAGE)
        process = start(job.program, job.arguments)
        _, err = process.communicate(timeout=300)
        assert process.returncode == 1, (moment, err[-2000:])
        *before, last = err.splitlines()
        assert last.startswith("error: ") and "No space left on device" in last, err
        assert not [line for line in before if "rror" in line or "Traceback" in line], err
        left = [path for path in disk.rglob("*") if LEFT.fullmatch(path.name)]
        assert not left, moment
        filler.unlink()
        finish(start(job.program, job.arguments))
        assert job.result() == expected, moment
    request.config.stash[TABLES].append(
        f"{job.program}: a full disk at {MOMENTS} moments, {need} pages"
    )


def pages_left(place: Path) -> int:
    facts = os.statvfs(place)
    return facts.f_bavail * facts.f_frsize // PAGE
