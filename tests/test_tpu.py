"""The scripts for Cloud TPU against a stand-in for gcloud, which runs them on two "hosts" here."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import test_docs
from gcloud_standin import Cloud
from tpu_cloud import (
    PROGRAMS,
    ROOT,
    TPU,
    actions,
    environment,
    gcloud,
    launch,
    let_count,
    program,
    started,
    steps,
    wait_until,
)


@pytest.fixture
def cloud(tmp_path):
    """A cloud without TPUs, whose jobs may count to 5."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "buckets" / "b").mkdir(parents=True)
    for name, text in PROGRAMS.items():
        program(tmp_path, name, text)
    result = Cloud(tmp_path)
    let_count(result, 5)
    yield result
    for name in result.states:
        result.take_away(name)


# ------------------------------------------------------------------------------ one by one


@pytest.mark.parametrize("arguments", [(), ("run",), ("keep",), ("fly",)])
def test_usage(arguments, cloud):
    assert "usage:" in launch(cloud, *arguments, code=2).stderr
    assert "usage:" in launch(cloud, "create", TPU_NAME="", code=2).stderr


def test_a_job_outlives_its_terminal_and_stops_when_asked(cloud):
    assert "moe: NONE" in launch(cloud, "status").stdout
    assert launch(cloud, "create").stdout.splitlines() == [
        "moe: WAITING_FOR_RESOURCES", "moe: PROVISIONING", "moe: ACTIVE",
    ]  # fmt: skip
    assert "moe-w-1: installed, Python 3.12.1" in launch(cloud, "setup").stdout
    # `launch` returns when nothing holds its output any more: the job does not.
    launch(cloud, "run", "train", "--gin.MODEL_DIR=../bucket/a b", "--gin_file=it's")
    words = "-m moe_jax.train --gin.MODEL_DIR=../bucket/a b --gin_file=it's --multiprocess_tpu"
    wait_until(lambda: steps(cloud) > 1)
    assert started(cloud) == [f"moe-w-0 {words}", f"moe-w-1 {words}"]
    status = launch(cloud, "status").stdout.splitlines()
    assert status[0] == "moe: ACTIVE"
    assert sorted(status[1:]) == ["moe-w-0 running", "moe-w-1 running"]
    assert "a job runs already" in launch(cloud, "run", "train", code=1).stderr
    launch(cloud, "stop")
    at = steps(cloud)
    assert sorted(launch(cloud, "logs", "-n", "1").stdout.splitlines()) == [
        "moe-w-0: saved", "moe-w-1: saved",
    ]  # fmt: skip
    assert "moe-w-0 stopped" in launch(cloud, "status").stdout
    assert 1 < at == steps(cloud) < 20
    launch(cloud, "delete")
    assert cloud.states == {}


def test_a_command_that_ignores_the_request_is_killed(cloud):
    launch(cloud, "create")
    launch(cloud, "setup")
    launch(cloud, "run", "stubborn")
    wait_until(lambda: launch(cloud, "logs").stdout.count("up") == 2)
    for home in cloud.homes("moe"):  # as `stop`, with less patience
        subprocess.run(
            ["bash", "moe_jax/tpu/job.sh", "stop"], cwd=home, check=True, timeout=20,
            env={"PATH": f"{cloud.directory}/bin:/usr/bin:/bin", "GRACE": "0.5"},
        )  # fmt: skip
    assert launch(cloud, "status").stdout.count("stopped") == 2


@pytest.mark.parametrize(("settings", "type_", "runtime", "spot"), [
    ({}, "v5litepod-8", "v2-alpha-tpuv5-lite", False),
    ({"TYPE": "v5e-16", "SPOT": "1"}, "v5litepod-16", "v2-alpha-tpuv5-lite", True),
    ({"TYPE": "v5p-8"}, "v5p-8", "v2-alpha-tpuv5", False),
    ({"TYPE": "v6e-4", "SPOT": "1"}, "v6e-4", "v2-alpha-tpuv6e", True),
    ({"TYPE": "v4-8"}, "v4-8", "tpu-ubuntu2204-base", False),
    ({"TYPE": "v9-8", "RUNTIME": "new"}, "v9-8", "new", False),
])  # fmt: skip
def test_generations(settings, type_, runtime, spot, cloud):
    launch(cloud, "create", "--network=mine", PROJECT="p", **settings)
    (call,) = (call for call in cloud.calls if call[3] == "create")
    assert {f"--accelerator-type={type_}", f"--runtime-version={runtime}", "--network=mine",
            "--node-id=moe", "--zone=z", "--project=p"} <= set(call)  # fmt: skip
    assert ("--spot" in call) == spot


def test_an_unknown_generation(cloud):
    done = launch(cloud, "create", TYPE="v9-8", code=1)
    assert "TYPE=v9-8 is none of v5e-N, v5p-N, v6e-N" in done.stderr


def test_a_request_that_fails(cloud):
    cloud.set_state("moe", "FAILED")
    assert "already exists" in launch(cloud, "create", code=1).stderr
    launch(cloud, "delete")
    assert "already exists" not in launch(cloud, "create").stderr


# ------------------------------------------------------------------------------ keep


def test_keep_makes_everything_anew_after_each_preemption_until_the_job_is_done(cloud):
    with subprocess.Popen(
        [TPU / "launch.sh", "keep", "train", "--a=b c"], env=environment(cloud, SPOT="1"),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as process:  # fmt: skip
        for at in (5, 10):
            wait_until(lambda at=at: steps(cloud) == at)
            cloud.preempt("moe")
            let_count(cloud, at + 5)  # on new hosts
        wait_until(lambda: steps(cloud) == 15)
        let_count(cloud, 20)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out
    assert steps(cloud) == 20
    # It may have begun anew on hosts that were gone a moment later.
    done = " ".join([*actions(cloud), ""])
    assert re.fullmatch("create (scp )+(delete create (scp )+){2}", done), done
    assert started(cloud) == [
        f"moe-w-{i} -m moe_jax.train --a=b c --multiprocess_tpu" for i in (0, 0, 0, 1, 1, 1)
    ]
    assert out.count("SUSPENDED") + out.count("PREEMPTED") == 2  # of the resource or its hosts
    assert "moe: moe-w-0 done, moe-w-1 done" in out
    assert cloud.states == {"moe": "ACTIVE"}


def test_keep_can_be_interrupted_and_started_again(cloud):
    process = subprocess.Popen(
        [TPU / "launch.sh", "keep", "train"], env=environment(cloud), stdout=subprocess.DEVNULL
    )
    wait_until(lambda: steps(cloud) > 1)
    process.kill()
    process.wait()
    assert "another job runs there" in launch(cloud, "keep", "eval", code=1).stderr
    let_count(cloud, 20)
    launch(cloud, "keep", "train")
    assert steps(cloud) == 20
    assert len(started(cloud)) == 2
    assert actions(cloud) == ["create", "scp"]


def test_keep_starts_again_what_dies_but_not_for_ever(cloud):
    done = launch(cloud, "keep", "killed", RETRIES="2", code=1)
    assert "moe-w-0 failed 137" in done.stdout
    assert done.stderr.splitlines()[-1] == "error: gives up after 3 failures in a row"
    assert len(started(cloud)) == 3 * 2
    assert actions(cloud) == ["create", "scp", "scp", "scp"]


def test_keep_gives_up_when_requests_fail(cloud):
    failed = 'grep -qs moe "$HOME/states.json" && { echo FAILED; exit; }'
    gcloud(cloud, f"*describe*) {failed} ;;")
    done = launch(cloud, "keep", "train", RETRIES="2", code=1)
    assert done.stderr.splitlines()[-1] == "error: gives up after 3 failures in a row"
    assert actions(cloud) == ["create", "delete"] * 2 + ["create"]


def test_keep_ends_where_gcloud_refuses(cloud):
    gcloud(cloud, "*describe*) echo 'ERROR: PERMISSION_DENIED: on project p' >&2; exit 1 ;;")
    done = launch(cloud, "keep", "train", code=1)
    assert done.stderr.splitlines() == [
        "ERROR: PERMISSION_DENIED: on project p", "error: gcloud does not answer about moe",
    ]  # fmt: skip


def test_keep_says_why_hosts_are_unreachable(cloud):
    closed = "[[ -e $HOME/open ]] || { echo 'ERROR: port 22: timed out' >&2; exit 255; }"
    gcloud(cloud, f"*' ssh '*) {closed} ;;")
    let_count(cloud, 20)
    with subprocess.Popen(
        [TPU / "launch.sh", "keep", "train"], env=environment(cloud),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stderr.readline() == "ERROR: port 22: timed out\n"
        (cloud.directory / "open").touch()
        process.communicate(timeout=60)
    assert process.returncode == 0


def test_keep_replaces_hosts_that_are_gone_while_the_resource_seems_active(cloud):
    launch(cloud, "create")
    cloud.take_away("moe")
    let_count(cloud, 20)
    assert "moe: PREEMPTED" in launch(cloud, "keep", "train").stdout
    assert actions(cloud) == ["create", "delete", "create", "scp"]
    assert steps(cloud) == 20


def test_keep_starts_again_on_a_host_that_was_restarted(cloud):
    with subprocess.Popen(
        [TPU / "launch.sh", "keep", "train"], env=environment(cloud),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as process:  # fmt: skip
        wait_until(lambda: steps(cloud) > 1 and len(started(cloud)) == 2)
        group = (cloud.homes("moe")[1] / "moe_jax" / "job" / "group").read_text()
        os.killpg(int(group), 9)
        wait_until(lambda: len(started(cloud)) == 4)
        let_count(cloud, 20)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out
    assert "moe-w-1 lost" in out
    assert len(started(cloud)) == 4


def test_keep_does_not_repeat_a_command_that_is_refused(cloud):
    done = launch(cloud, "keep", "wrong", code=1)
    assert "moe-w-0: error: no gin file 'wrong'" in done.stdout
    assert len(started(cloud)) == 2
    launch(cloud, "keep", "wrong", code=1)  # given again, it is tried again
    assert len(started(cloud)) == 4
    launch(cloud, "keep", "report", code=1)
    assert len(started(cloud)) == 6


def test_keep_ends_when_the_job_is_stopped(cloud):
    with subprocess.Popen(
        [TPU / "launch.sh", "keep", "train"], env=environment(cloud),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            wait_until(lambda: steps(cloud) > 1)
            launch(cloud, "stop")
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert err.splitlines()[-1] == "error: the job was stopped"
    assert steps(cloud) < 20
    let_count(cloud, 20)
    launch(cloud, "keep", "train")  # given again, it goes on
    assert steps(cloud) == 20


# ------------------------------------------------------------------------------ setup.sh


def test_a_host_of_python_3_10_gets_what_it_lacks(cloud):
    """uv by pip, a newer Python and the packages by uv, gcsfuse by apt."""
    uv, fuse = (cloud.directory / "bin" / name for name in ("uv", "gcsfuse"))
    for path in (uv, fuse):
        path.rename(path.with_suffix(".later"))
    program(cloud.directory, "python3", f"""
        echo "python3 $*" >>"$HOME/installed"
        mkdir -p ~/.local/bin; cp {uv}.later ~/.local/bin/uv
    """)  # fmt: skip
    program(cloud.directory, "curl", 'echo "key of $*"')
    program(cloud.directory, "tee", 'cat >>"$HOME/installed"')
    program(cloud.directory, "lsb_release", "echo jammy")
    program(cloud.directory, "apt-get", f"""
        echo "apt-get $*" >>"$HOME/installed"
        [[ ${{@: -1}} != gcsfuse ]] || cp {fuse}.later {fuse}
    """)  # fmt: skip
    cloud.hosts = 1
    launch(cloud, "create")
    home = cloud.homes("moe")[0]
    (home / "moe_jax").mkdir()
    shutil.copytree(TPU, home / "moe_jax" / "tpu")
    done = subprocess.run(
        ["bash", home / "moe_jax" / "tpu" / "setup.sh", "b"], capture_output=True, text=True,
        env={"HOME": str(home), "STANDIN": str(cloud.directory), "STANDIN_HOST": "moe-w-0",
             "PATH": f"{cloud.directory}/bin:{shell_only(cloud.directory)}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = (home / "installed").read_text().splitlines()
    assert [line.partition(" ")[0] for line in lines] == [
        "python3", "uv", "uv", "key", "deb", "apt-get", "apt-get",
    ]  # fmt: skip
    pip, venv, install, _, source, update, gcsfuse = lines
    assert pip.endswith("pip install --quiet --user uv")
    assert ">=3.11,<3.14" in venv
    assert "--constraint constraints.txt" in install and install.endswith(".[tpu]")
    assert source.endswith("gcsfuse-jammy main")
    assert update.endswith("update") and gcsfuse.endswith("install gcsfuse")
    assert (home / "bucket").resolve() == cloud.directory / "buckets" / "b"


def shell_only(directory: Path) -> Path:
    """A directory with the programs that any Linux has, and no others."""
    path = directory / "shell"
    path.mkdir()
    for name in ("bash", "env", "mkdir", "rmdir", "cp", "ln", "cat", "dirname", "wc", "sleep"):
        (path / name).symlink_to(shutil.which(name))
    return path


# ------------------------------------------------------------------------------ docs and style


def test_every_command_of_the_guide_runs(cloud):
    """In order, as a user would, on two hosts of the stand-in."""
    let_count(cloud, 20)
    lines = [
        c
        for c in test_docs.commands(TPU / "README.md")
        if "moe_jax.plan" not in c and "pip" not in c
    ]
    done = subprocess.run(
        ["bash", "-e", "-c", "\n".join(lines)], cwd=ROOT, capture_output=True, text=True,
        timeout=60, env=environment(cloud),
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    shown = {line.split()[1] for line in lines if line.startswith("tpu/launch.sh")}
    known = launch(cloud, code=2).stderr.partition("environment:")[0]
    assert shown == set(re.findall(r"^  (\w+) ", known, re.M))
    for command in set(started(cloud)):
        test_docs.test_command_resolves(f"python {command.partition(' ')[2]}")
    assert cloud.states == {}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcloud") is None, reason="gcloud is not installed")
def test_gcloud_itself_knows_every_flag(cloud):
    """It only parses: nothing is sent."""
    launch(cloud, "keep", "wrong", SPOT="1", PROJECT="p", code=1)
    cloud.take_away("moe")
    launch(cloud, "keep", "wrong", SPOT="1", PROJECT="p", code=1)
    kinds = {tuple(call[:4]): call for call in cloud.calls}
    assert len(kinds) == 6
    for call in kinds.values():
        call = ["--command=x" if word.startswith("--command=") else word for word in call]
        done = subprocess.run(
            ["gcloud", "meta", "lint-gcloud-commands",
             f"--command-string={shlex.join(['gcloud', *call])}"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        (verdict,) = json.loads(done.stdout)
        assert verdict["success"], verdict["error_message"]


@pytest.mark.parametrize("script", sorted(TPU.glob("*.sh")), ids=lambda p: p.name)
def test_scripts_are_clean(script):
    beside = Path(sys.executable).parent / "shellcheck"
    checker = str(beside) if beside.exists() else shutil.which("shellcheck")
    if checker is None:
        assert subprocess.run(["bash", "-n", script]).returncode == 0
        pytest.skip("ShellCheck is not installed")
    done = subprocess.run([checker, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
