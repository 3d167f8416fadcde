"""Prepares the experiment `gym_gpu` for a machine with a GPU, and runs it there.

    python -m benchmarks.gym_gpu prepare BUNDLE.tar.xz --crossfit_dir=DIR --full_dir=DIR
    python -m benchmarks.gym_gpu run BUNDLE.tar.xz RESULTS.tar.xz

`prepare` needs CrossFit's few-shot files and its full-size files, whose inputs are the text of the
pre-training. Test files are cut to 128 lines. The bundle holds all prepared data; running it needs
neither those files nor TensorFlow. `run` trains, scores and reports; RESULTS has everything but
checkpoints. It adds the programs that it compiled to the bundle, so the next run on such a machine
compiles nothing. --tiny does both with a minuscule model, few steps and six tasks, on any machine.
"""

import argparse
import json
import lzma
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.common import run as run_main
from moe_jax.builtin_tasks import crossfit_data
from moe_jax.core import files
from moe_jax.core.errors import UserError

EXPERIMENT = "experiments/gym_gpu.gin"
BUNDLE_BYTES, RESULT_BYTES = 40_000_000, 16_000_000
TEST_LINES = 128
# The paths that the data was prepared from, which are part of the cache's key.
SETUP, CACHE, COMPILED = "setup.json", "cache", "compiled"
DATA_TINY = {
    "TASK_FEATURE_LENGTHS": "{'inputs': 64, 'targets': 16}", "VocabularyConfig.size": "600",
    "pretraining.characters": "3000", "pretraining.copies": "1", "BATCH_SIZE": "8",
    "DataConfig.rows_per_group": "4",
}  # fmt: skip
RUN_TINY = {
    "experiment.model": "models/tiny.gin", "experiment.eval_examples": "2",
    "experiment.upcycle_step": "2", "TRAIN_STEPS": "4", "CHECKPOINT_PERIOD": "2",
    "FinetuneConfig.steps": "2", "FinetuneConfig.test_examples": "2",
    "FinetuneConfig.learning_rates": "(1e-3,)",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("prepare", "run"):
        command = commands.add_parser(name)
        command.add_argument("bundle", type=Path)
        if name == "prepare":
            command.add_argument("--crossfit_dir", type=Path, required=True)
            command.add_argument("--full_dir", type=Path, required=True)
        else:
            command.add_argument("results", type=Path)
        command.add_argument("--tiny", action="store_true", help="to test that it runs")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        if arguments.command == "prepare":
            prepare(work, arguments.bundle, arguments.crossfit_dir, arguments.full_dir,
                    arguments.tiny)  # fmt: skip
        else:
            run(work, arguments.bundle, arguments.results, arguments.tiny)


def prepare(work: Path, bundle: Path, crossfit_dir: Path, full_dir: Path, tiny: bool) -> None:
    """Tokenises all data, and packs it.

    Raises:
        UserError: a directory is not CrossFit's, or the bundle is too large.
    """
    setup = {"CROSSFIT_DIR": str(work / "crossfit"), "PRETRAINING_DIR": str(full_dir.resolve())}
    shorten(crossfit_dir, work / "crossfit", tasks_per_part=3 if tiny else None)
    common = {**setup, "CACHE_DIR": str(work / CACHE), **(DATA_TINY if tiny else {})}
    for stage, more in (("pretrain", {}), ("dense", {"prepare.mixtures": "('crossfit_test',)"})):
        _call("prepare", [f"runs/gym_gpu_{stage}.gin"], {**common, **more})
    files.write_json(work / SETUP, {**setup, "tiny": tiny})
    pack(bundle, work, [SETUP, CACHE], BUNDLE_BYTES)


def run(work: Path, bundle: Path, results: Path, tiny: bool) -> None:
    """Runs the experiment on what `prepare` packed.

    Raises:
        UserError: there is no such bundle, or a stage failed.
    """
    unpack(bundle, work)
    setup = json.loads((work / SETUP).read_text())
    if setup.pop("tiny") != tiny:
        raise UserError(f"{bundle} was prepared {'without' if tiny else 'with'} --tiny")
    settings = {**setup, "MODEL_DIR": str(work / "run"), "CACHE_DIR": str(work / CACHE)}
    settings |= {**DATA_TINY, **RUN_TINY} if tiny else {}
    begin = time.perf_counter()
    _call("experiment", [EXPERIMENT], settings, [f"--compilation_cache_dir={work / COMPILED}"])
    print(f"the experiment took {time.perf_counter() - begin:.0f} s")
    found = [p for p in (work / "run").rglob("*") if p.is_file() and "checkpoints" not in p.parts]
    pack(results, work, [str(p.relative_to(work)) for p in sorted(found)], RESULT_BYTES)
    pack(bundle, work, [SETUP, CACHE, COMPILED], BUNDLE_BYTES)


def shorten(source: Path, target: Path, tasks_per_part: int | None = None) -> None:
    """Copies CrossFit's few-shot files of the random partition; test files get fewer lines.

    Args:
        tasks_per_part: only so many training and so many test tasks.

    Raises:
        UserError: there is no such directory, or it holds no task of the partition.
    """
    if not source.is_dir():
        raise UserError(f"{source}: no such directory")
    here = set(crossfit_data.present(source))
    partition = crossfit_data.PUBLISHED["random"]
    tasks = [
        task
        for part in ("train", "test")
        for task in [t for t in partition[part] if t in here][:tasks_per_part]
    ]
    if not tasks:
        raise UserError(f"{source}: holds no task of CrossFit's random partition")
    for task in tasks:
        splits = crossfit_data.few_shot_splits(source, task)
        for split, paths in splits.items():
            for path in paths:
                lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
                if split == "test" and len(lines) > TEST_LINES:
                    lines = [lines[i * len(lines) // TEST_LINES] for i in range(TEST_LINES)]
                files.write_text(target / task / path.name, "".join(lines))


def pack(archive: Path, root: Path, names: Iterable[str], limit: int) -> None:
    """Writes files and directories of `root` to a .tar.xz.

    Raises:
        UserError: it has more than `limit` bytes; it is written all the same.
    """
    archive.parent.mkdir(parents=True, exist_ok=True)
    # Copies of a text are far apart, so the dictionary is large.
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 1 << 27}]
    with (
        lzma.open(archive, "w", filters=filters) as stream,
        tarfile.open(fileobj=stream, mode="w") as tar,
    ):
        for name in names:
            if (root / name).exists():
                tar.add(root / name, name)
    size = archive.stat().st_size
    print(f"{archive}: {size / 1e6:.1f} MB")
    if size > limit:
        raise UserError(f"{archive} has {size / 1e6:.1f} MB, more than {limit / 1e6:.0f}")


def unpack(archive: Path, root: Path) -> None:
    """Unpacks what `pack` wrote.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(root, filter="data")
    except (OSError, tarfile.TarError, lzma.LZMAError) as e:
        raise UserError(f"cannot read {archive}: {e}") from e


def _call(
    module: str, gin_files: Sequence[str], settings: dict[str, str], more: Sequence[str] = ()
) -> None:
    command = [
        sys.executable, "-m", f"moe_jax.{module}", *(f"--gin_file={f}" for f in gin_files),
        *(f"--gin.{name}={value}" for name, value in settings.items()), *more,
    ]  # fmt: skip
    if code := subprocess.run(command, check=False).returncode:
        raise UserError(f"moe_jax.{module} failed with exit code {code}: see above")


if __name__ == "__main__":
    run_main(main)
