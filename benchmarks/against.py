"""Compares the speed of this checkout with another commit, side by side in one run.

    python -m benchmarks.against 8258515 [--only train_dense] [--rounds 7] [--json FILE]

Two processes, one for each commit (the other one in a `git worktree`), measure in turn, so that
both run under the same load. A ratio above 1 means that this checkout is slower.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
CASES = (
    "train_dense", "train_e3", "train_e3_all", "train_e24", "decode_greedy", "decode_mixed",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("commit", help="to compare with")
    parser.add_argument("--only", choices=CASES, action="append", help="repeatable; all if absent")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--size", default="small", help="of `benchmarks.common.SIZES`")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    results = {}
    with other_checkout(args.commit) as other:
        for case in args.only or CASES:
            workers = [Worker(path, case, args.size) for path in (ROOT, other)]
            for worker in workers:  # compiles one case at a time
                worker.measure(2)
            rounds = [[worker.measure(1) for worker in workers] for _ in range(args.rounds)]
            for worker in workers:
                worker.close()
            here, there = np.median(rounds, axis=0)
            ratio = float(np.median([a / b for a, b in rounds]))
            results[case] = {"here_s": here, "there_s": there, "ratio": ratio}
            print(f"{case:<16}{here:>9.4f} s {there:>9.4f} s   ratio {ratio:.3f}", flush=True)
            if args.json:
                Path(args.json).write_text(json.dumps(results, indent=1) + "\n")


@contextlib.contextmanager
def other_checkout(commit: str) -> Iterator[Path]:
    """A directory with the files of a commit."""
    with tempfile.TemporaryDirectory() as parent:
        path = Path(parent) / "checkout"
        git = ["git", "-C", str(ROOT), "worktree"]
        add = [*git, "add", "--detach", str(path), commit]
        subprocess.run(add, check=True, capture_output=True)
        try:
            yield path
        finally:
            subprocess.run([*git, "remove", "--force", str(path)], check=True)


class Worker:
    """A process that imports one checkout and runs one case on request."""

    def __init__(self, checkout: Path, case: str, size: str):
        command = [sys.executable, __file__, case, size]
        self._process = subprocess.Popen(
            command, cwd=checkout, env=os.environ | {"PYTHONPATH": str(checkout), "AGAINST": "1"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def measure(self, times: int) -> float:
        """Seconds of the last of `calls` calls."""
        self._process.stdin.write(f"{times}\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def work(case: str, size: str) -> None:
    """The loop of a worker process. Uses only names that both checkouts have."""
    import time

    from benchmarks.common import ALL_EXPERTS, ROUTED, Training, build, random_batch
    from benchmarks.decoding import decoder

    try:
        from moe_jax.kernels import memory
    except ImportError:  # its place in older commits
        from moe_jax import memory
    memory.run_in_main_thread()
    if case.startswith("train"):
        router = ALL_EXPERTS if case.endswith("all") else ROUTED
        training = Training(build(size, {"train_dense": 1, "train_e24": 24}.get(case, 3), router))
        batch = training.put(random_batch(training.model, 4, 8, (112, 16)))

        def run():
            training.run(batch)
    else:
        try:
            from moe_jax.decoding.rows import row_routes
        except ImportError:
            from moe_jax.model.rows import row_routes
        mixed = case == "decode_mixed"
        rows = 16
        training = Training(build(size, 3 if mixed else 1, ROUTED, tasks=rows))
        batch = training.put(random_batch(training.model, 1, rows, (64, 64)))
        decode_all, params = decoder(training.model, 64, 1), training.state.params["backbone"]
        routes = None
        if mixed:
            experts = np.random.default_rng(0).integers(0, 3, (rows, training.model.layers))
            routes = row_routes(np.eye(3, dtype=np.float32)[experts], np.arange(rows), 1)

        def run():
            np.asarray(decode_all(params, routes, batch))

    first = True
    for line in sys.stdin:
        for _ in range(int(line)):
            begin = time.perf_counter()
            run()
            seconds = time.perf_counter() - begin
            if first:
                memory.keep_freed()
                first = False
        print(seconds, flush=True)


if __name__ == "__main__":
    if os.environ.get("AGAINST"):
        work(*sys.argv[1:])
    else:
        main()
