"""`finetune` of this checkout and of another commit, in turn: seconds of the whole commands.

    python -m benchmarks.fewshot_commits 8258515 [--rounds 3] [--whole] [--json FILE]

Both adapt `models/tiny.gin` to the same tasks, those of the other commit's skills gym, which is
copied under a name of its own, with that commit's grid. At 8258515: 12 tasks x 3 seeds x 2 learning
rates x 3 starts = 216 runs of 16 steps of 8 examples, scored on 16 dev examples, the best on 64
test examples. Each first trains its own dense model and mixture (500 and 250 steps). The mixture
adapts as each commit's quickstart does it: at 8258515 whole, from the nearest training task; here
merged, from the mean route. `--whole` does here what is done there.

The first round starts from an empty compilation cache, the others from a filled one. CPU seconds
differ less than wall seconds on a machine that does other things. 8258515 needs `tensorboardX`.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.against import ROOT, other_checkout
from moe_jax.core import files

GYM = "gym_of_that_commit"
MERGED = {"FinetuneConfig.tune": "'merged'", "FinetuneConfig.representation": "'mean'"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("commit", help="to compare with")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--whole", action="store_true", help="the mixture adapts whole here, too")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    results = []
    with other_checkout(args.commit) as other, tempfile.TemporaryDirectory() as root:
        _copy_gym(other, Path(root) / "modules" / GYM)
        sides = [Side("here", ROOT, other, root, {} if args.whole else MERGED)]
        sides.append(Side("there", other, other, root, {}))
        for side in sides:
            side.train()
        for number in range(args.rounds):
            cache = "filled" if number else "empty"
            for side in sides:
                row = {"side": side.name, "cache": cache, **side.finetune()}
                print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
                results.append(row)
                if args.json:
                    files.write_json(args.json, results)
    for cache in dict.fromkeys(row["cache"] for row in results):
        for unit in ("wall_s", "cpu_s"):
            here, there = (
                np.median([r[unit] for r in results if (r["side"], r["cache"]) == (side, cache)])
                for side in ("here", "there")
            )
            print(f"{cache} cache, {unit}: there / here = {there / here:.2f}")


def _copy_gym(checkout: Path, to: Path) -> None:
    """The skills gym as a package that both commits can read: it needs `moe_jax.metrics` alone."""
    to.mkdir(parents=True)
    (to / "__init__.py").touch()
    for path in (checkout / "tasks").glob("skills_*.py"):
        text = path.read_text().replace("from tasks.", f"from {GYM}.")
        (to / path.name).write_text(text.replace("from tasks import", f"from {GYM} import"))


class Side:
    """A checkout and the runs that it makes."""

    def __init__(self, name: str, checkout: Path, gin: Path, root: str, settings: dict[str, str]):
        """
        Args:
            gin: the checkout whose gin files of runs are read.
            settings: further bindings of `finetune`.
        """
        self.name, self._gin, self._settings = name, gin / "gin_configs" / "runs", settings
        self._place = Path(root) / name
        self._place.mkdir()
        paths = (checkout, Path(root) / "modules", *filter(None, [os.environ.get("PYTHONPATH")]))
        self._environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "JAX_COMPILATION_CACHE_DIR": str(self._place / "xla"), "JAX_PLATFORMS": "cpu",
        }  # fmt: skip

    def train(self) -> None:
        """The dense model and both stages of the mixture."""
        bindings = {"dense": {}, "stage1": {}, "stage2": {"ROUTER_CHECKPOINT_PATH": "stage1"}}
        for run, own in bindings.items():
            steps = "250" if run == "stage2" else "500"
            self._run("train", f"skills_gym_{run}", {"MODEL_DIR": run, "TRAIN_STEPS": steps, **own})

    def finetune(self) -> dict[str, float]:
        """Seconds and runs of one command, with a directory of its own."""
        out = f"few_shot_{time.time_ns()}"
        places = {"MODEL_DIR": out, "DENSE_DIR": "dense", "MOE_DIR": "stage2"}
        before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        self._run("finetune", "skills_gym_finetune", places | self._settings)
        after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - begin
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        runs = len(files.read_bytes(self._place / out / "runs.jsonl").splitlines())
        return {"runs": runs, "wall_s": round(wall, 1), "cpu_s": round(cpu, 1)}

    def _run(self, command: str, gin: str, bindings: dict[str, str]) -> None:
        flags = ["--gin_file=models/tiny.gin", f"--gin_file={self._gin / gin}.gin"]
        flags += [f"--gin.TASK_MODULES=('{GYM}.skills_gym',)"]
        flags += [f"--gin.{key}={value}" for key, value in bindings.items()]
        done = subprocess.run(
            [sys.executable, "-m", f"moe_jax.{command}", *flags], cwd=self._place,
            env=self._environment, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            sys.exit(f"{command} of {self.name} failed:\n{done.stderr[-2000:]}")


if __name__ == "__main__":
    main()
