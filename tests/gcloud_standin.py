"""A stand-in for `gcloud compute tpus`: hosts are directories and processes of this machine.

A queued resource waits for a look or two, is ACTIVE, and may be preempted: then its processes are
killed and its hosts' files are gone. Every call is recorded in `calls.jsonl`. What gcloud itself
refuses is refused: unknown flags, a name that is taken, commands on hosts that are not there.

    GCLOUD_STANDIN=DIRECTORY python gcloud_standin.py compute tpus ...

DIRECTORY/bin holds the programs of a host's image, DIRECTORY/hosts the hosts' homes,
DIRECTORY/buckets the buckets.
"""

import argparse
import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

ON_THE_WAY = ("WAITING_FOR_RESOURCES", "PROVISIONING")  # one look each


class Cloud:
    """The queued resources and their hosts, in a directory that all calls share."""

    def __init__(self, directory: Path, hosts: int = 2):
        self.directory, self.hosts = Path(directory), hosts

    @property
    def states(self) -> dict[str, str]:
        path = self.directory / "states.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def set_state(self, name: str, state: str | None) -> None:
        """`state` None removes the resource."""
        states = self.states | {name: state}
        path = self.directory / "states.json"
        path.with_suffix(".new").write_text(
            json.dumps({k: v for k, v in states.items() if v is not None})
        )
        path.with_suffix(".new").rename(path)

    def homes(self, name: str) -> list[Path]:
        return [self.directory / "hosts" / f"{name}-w-{i}" for i in range(self.hosts)]

    def start(self, name: str) -> None:
        for home in self.homes(name):
            home.mkdir(parents=True)

    def take_away(self, name: str) -> None:
        """Kills what runs on the hosts, without notice. All files of a host are gone at once: a
        command there never finds a part of them."""
        for home in self.homes(name):
            with tempfile.TemporaryDirectory(dir=self.directory) as gone:
                with contextlib.suppress(FileNotFoundError):
                    home.rename(Path(gone) / home.name)
                while pids := processes_in(Path(gone)):  # which start more until they are gone
                    for pid in pids:
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)

    def preempt(self, name: str) -> None:
        self.set_state(name, "SUSPENDED")
        self.take_away(name)

    def look(self, name: str) -> str | None:
        """The state, one step further on the way to ACTIVE."""
        state = self.states.get(name)
        if state in ON_THE_WAY:
            following = (*ON_THE_WAY, "ACTIVE")[ON_THE_WAY.index(state) + 1]
            if following == "ACTIVE":
                self.start(name)
            self.set_state(name, following)
        return state

    def on_hosts(self, name: str, command: str) -> int:
        """Runs a command on all hosts at once; the exit code of the first that fails."""
        processes = [
            subprocess.Popen(
                ["bash", "-c", command], cwd=home, stdin=subprocess.DEVNULL, start_new_session=True,
                env={"HOME": str(home), "STANDIN_HOST": home.name, "STANDIN": str(self.directory),
                     "PATH": f"{self.directory}/bin:/usr/bin:/bin"},
            )
            for home in self.homes(name)
        ]  # fmt: skip
        return next((code for p in processes if (code := p.wait())), 0)

    @property
    def calls(self) -> list[list[str]]:
        lines = (self.directory / "calls.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


def processes_in(directory: Path) -> list[int]:
    """The processes whose working directory is there."""
    found = []
    for link in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if Path(os.readlink(link)).is_relative_to(directory):
                found.append(int(link.parent.name))
    return found


def refuse(action: str, message: str) -> int:
    print(f"ERROR: (gcloud.compute.tpus.{action}) {message}", file=sys.stderr)
    return 1


def parser() -> argparse.ArgumentParser:
    """The flags of gcloud that may be used; its real parser is asked in `test_tpu`."""
    result = argparse.ArgumentParser(prog="gcloud", allow_abbrev=False)
    groups = result.add_subparsers(dest="group", required=True)
    flags = {
        "queued-resources": {
            "create": ["node-id", "accelerator-type", "runtime-version", "network"],
            "describe": ["format"],
            "delete": [],
        },
        "tpu-vm": {
            "ssh": ["worker", "command", "ssh-flag"],
            "scp": ["worker"],
            "describe": ["format"],
        },
    }
    for group, actions in flags.items():
        choices = groups.add_parser(group).add_subparsers(dest="action", required=True)
        for action, names in actions.items():
            one = choices.add_parser(action, allow_abbrev=False)
            if action == "scp":
                one.add_argument("source")
            one.add_argument("name")
            one.add_argument("--zone", required=True)
            one.add_argument("--project")
            one.add_argument("--quiet", action="store_true")
            for name in names:
                one.add_argument(f"--{name}", action="append")
            for name in {"create": ["spot"], "delete": ["force"]}.get(action, []):
                one.add_argument(f"--{name}", action="store_true")
    return result


def main(argv: list[str]) -> int:
    directory = Path(os.environ["GCLOUD_STANDIN"])
    with open(directory / "calls.jsonl", "a") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        f.write(json.dumps(argv) + "\n")
    if argv[:3] == ["storage", "buckets", "create"]:
        (directory / "buckets" / argv[3].removeprefix("gs://")).mkdir()
        return 0
    assert argv[:2] == ["compute", "tpus"], argv
    call = parser().parse_args(argv[2:])
    cloud = Cloud(directory)
    name, _, destination = call.name.partition(":")
    action = f"{call.group}.{call.action}"
    if action == "queued-resources.create":
        if name in cloud.states:
            return refuse(action, f"ALREADY_EXISTS: Resource '{name}' already exists")
        cloud.set_state(name, ON_THE_WAY[0])
        return 0
    state = cloud.look(name) if call.action == "describe" else cloud.states.get(name)
    if state is None:
        return refuse(action, f"NOT_FOUND: Resource '{name}' was not found")
    if action == "queued-resources.describe":
        print(state)
        return 0
    if action == "queued-resources.delete":
        if state != "SUSPENDED" and not call.force:
            return refuse(action, "FAILED_PRECONDITION: the resource is in use; use --force")
        cloud.take_away(name)
        cloud.set_state(name, None)
        return 0
    there = all(home.exists() for home in cloud.homes(name))
    if action == "tpu-vm.describe":
        print("READY" if there else "PREEMPTED")
        return 0
    if not there:
        return refuse(action, f"TPU {name} is not in a state to connect to")
    if action == "tpu-vm.scp":
        for home in cloud.homes(name):
            shutil.copy(call.source, home / destination)
        return 0
    return cloud.on_hosts(name, call.command[0])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
