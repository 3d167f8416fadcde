"""The commands that the TPU scripts would call, by a dry run."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

TPU = Path(__file__).resolve().parent.parent / "tpu"


def launch(*arguments, **environment):
    return subprocess.run(
        [TPU / "launch.sh", *arguments], capture_output=True, text=True,
        env={"PATH": os.environ["PATH"], "DRY_RUN": "1", **environment},
    )  # fmt: skip


def calls(*arguments, **environment):
    done = launch(*arguments, TPU_NAME="moe", ZONE="z", **environment)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("arguments", [(), ("run",), ("fly",)])
def test_usage(arguments):
    done = launch(*arguments, TPU_NAME="moe", ZONE="z")
    assert done.returncode == 2 and "usage:" in done.stderr
    assert launch("create").returncode == 2  # no TPU_NAME


def test_run_is_one_job_on_every_host():
    (call,) = calls("run", "train", "--gin.MODEL_DIR=/a/b c", PROJECT="p")
    assert call[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "moe"]
    assert "--worker=all" in call and "--project=p" in call
    command = call[-1].removeprefix("--command=cd moe_jax && ")
    assert shlex.split(command) == [
        ".venv/bin/python", "-m", "moe_jax.train", "--gin.MODEL_DIR=/a/b c", "--multiprocess_tpu",
    ]  # fmt: skip


def test_setup_copies_the_checkout():
    archive, copy, install = calls("setup", BUCKET="bucket")
    assert archive[:2] == ["git", "-C"] and archive[-1] == "HEAD"
    assert copy[4] == "scp" and copy[6] == "moe:moe_jax.tar.gz"
    assert install[-1].endswith("bash moe_jax/tpu/setup.sh bucket")


def test_create_and_delete():
    assert "--accelerator-type=v4-8" in calls("create", TYPE="v4-8")[0]
    assert calls("delete")[0][-1] == "--quiet"


@pytest.mark.parametrize("script", sorted(TPU.glob("*.sh")), ids=lambda p: p.name)
def test_scripts_are_bash(script):
    assert subprocess.run(["bash", "-n", script]).returncode == 0
