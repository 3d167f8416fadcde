"""Commands in processes that are forked when all is imported, which takes most of their time."""

import multiprocessing
import os
import runpy
import sys
import tempfile
from pathlib import Path

_FORKS = multiprocessing.get_context("forkserver")
# What the commands import, but none of them: each defines its flags as it runs.
_FORKS.set_forkserver_preload([
    "moe_jax.evaluation.inference", "moe_jax.experiments.plan", "moe_jax.planning.report",
    "moe_jax.report.build", "moe_jax.runs.train_loop", "moe_jax.unseen.adaptation",
    "moe_jax.unseen.representations",
])  # fmt: skip


def run(program: str, arguments: list[str]) -> tuple[int, str, str]:
    """(exit code, output, what standard error says) of a command on one device."""
    with tempfile.TemporaryDirectory() as directory:
        streams = [Path(directory) / name for name in ("stdout", "stderr")]
        process = _FORKS.Process(target=_main, args=(program, arguments, streams), daemon=True)
        process.start()
        process.join(300)
        return process.exitcode, *(stream.read_text() for stream in streams)


def _main(program: str, arguments: list[str], streams: list[Path]) -> None:
    for number, stream in enumerate(streams, 1):
        os.dup2(os.open(stream, os.O_CREAT | os.O_WRONLY), number)
    flags = os.environ["XLA_FLAGS"]
    os.environ["XLA_FLAGS"] = flags.replace("device_count=8", "device_count=1")
    sys.argv = [program, *arguments]
    runpy.run_module(f"moe_jax.{program}", run_name="__main__", alter_sys=True)
