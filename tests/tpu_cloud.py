"""What tests of the scripts for Cloud TPU share: hosts' programs, launching, and what was done."""

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

from gcloud_standin import Cloud

ROOT = Path(__file__).resolve().parent.parent
TPU = ROOT / "tpu"

# What a host's image has, or brings: a job counts to 20 in the bucket, on the first host,
# as far as a test lets it.
PROGRAMS = {
    "hostname": 'echo "$STANDIN_HOST"',
    "sudo": '"$@"',
    "mountpoint": "[[ -L $2 ]]",
    "gcsfuse": 'rmdir "$3"; mkdir -p "$STANDIN/buckets/$2"; ln -s "$STANDIN/buckets/$2" "$3"',
    "uv": """
        echo "uv $*" >>"$HOME/installed"
        if [[ $1 == venv ]]; then
          mkdir -p .venv/bin
          cp "$STANDIN/bin/job" .venv/bin/python
        fi
    """,
    "job": f"""
        [[ $1 == -m ]] || {{ echo "Python 3.12.1"; exit; }}
        exec {sys.executable} -S "$STANDIN/bin/count.py" "$2" "$@"
    """,
    # Not Bash: in 5.2 a signal that comes while `$(...)` is read can break the trap and be lost.
    "count.py": """
        import os, pathlib, signal, sys, time

        def save(*_):
            print("saved", flush=True)
            os._exit(75)

        standin, host = pathlib.Path(os.environ["STANDIN"]), os.environ["STANDIN_HOST"]
        with open(standin / "started", "a") as f:
            print(host, *sys.argv[2:], file=f)
        match sys.argv[1]:
            case "moe_jax.wrong":
                sys.exit("error: no gin file 'wrong'")
            case "moe_jax.report":
                print("python -m moe_jax.report: error: unrecognized arguments")
                sys.exit(2)
            case "moe_jax.killed":
                os.kill(os.getpid(), signal.SIGKILL)
            case "moe_jax.stubborn":
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                print("up", flush=True)
                while True:
                    time.sleep(1)
        signal.signal(signal.SIGTERM, save)
        steps = pathlib.Path.home() / "bucket" / "steps"
        steps.touch()
        while (n := len(steps.read_text().splitlines())) < 20:
            if host.endswith("-0") and n < int((standin / "limit").read_text()):
                with open(steps, "a") as f:
                    print("step", file=f)
                print("step", n + 1, flush=True)
            time.sleep(0.1)
    """,
}


def program(directory: Path, name: str, text: str) -> None:
    path = directory / "bin" / name
    path.write_text(f"#!/usr/bin/env bash\n{textwrap.dedent(text)}\n")
    path.chmod(0o755)


def environment(cloud: Cloud, **settings) -> dict[str, str]:
    tools = cloud.directory / "tools"
    if not tools.exists():
        gcloud(cloud)
    return {
        "PATH": f"{tools}:{os.environ['PATH']}", "HOME": str(cloud.directory), "POLL": "0.1",
        "GCLOUD_STANDIN": str(cloud.directory), "TPU_NAME": "moe", "ZONE": "z", "BUCKET": "b",
        "GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "safe.directory", "GIT_CONFIG_VALUE_0": "*",
        **settings,
    }  # fmt: skip


def gcloud(cloud: Cloud, answers: str = "") -> None:
    """Installs the stand-in. Cases of Bash, of all arguments as one word, come before it."""
    tools = cloud.directory / "tools"
    tools.mkdir(exist_ok=True)
    (tools / "gcloud").write_text(
        f"#!/usr/bin/env bash\ncase $* in\n{answers}\nesac\n"
        f'exec {sys.executable} -S {ROOT}/tests/gcloud_standin.py "$@"\n'
    )
    (tools / "gcloud").chmod(0o755)


def launch(cloud, *arguments, code: int = 0, **settings) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [TPU / "launch.sh", *arguments], capture_output=True, text=True, timeout=60,
        env=environment(cloud, **settings), cwd=cloud.directory,
    )  # fmt: skip
    assert done.returncode == code, f"{done.stdout}\n{done.stderr}"
    return done


def let_count(cloud: Cloud, limit: int) -> None:
    path = cloud.directory / "limit"
    path.with_suffix(".new").write_text(str(limit))
    path.with_suffix(".new").rename(path)


def wait_until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def steps(cloud) -> int:
    path = cloud.directory / "buckets" / "b" / "steps"
    return len(path.read_text().splitlines()) if path.exists() else 0


def started(cloud) -> list[str]:
    return sorted((cloud.directory / "started").read_text().splitlines())


def actions(cloud) -> list[str]:
    """The calls that change something, such as `create`."""
    return [call[3] for call in cloud.calls if call[3] in ("create", "delete", "scp")]
