"""The bundle of the experiment for a GPU: what goes in, how large it may be, and that it runs."""

import subprocess
import sys
import tarfile

import pytest
from toy_run import ROOT

from benchmarks import gym_gpu
from moe_jax.builtin_tasks import crossfit_data
from moe_jax.core import files
from moe_jax.core.errors import UserError

PARTITION = crossfit_data.PUBLISHED["random"]
TASKS = [*PARTITION["train"][:4], *PARTITION["test"][:3]]


def write_gym(root, tasks):
    """CrossFit's layout: few-shot files in `crossfit`, full-size files in `full`."""
    for number, task in enumerate(tasks):
        for seed in (13, 21):
            for part, count in (("train", 8), ("dev", 8), ("test", 300)):
                lines = [
                    f"The answer to {i} of {task} is not hard.\t{'yes' if i % 2 else 'no'}\n"
                    for i in range(1000 * seed, 1000 * seed + count)
                ]
                path = root / "crossfit" / task / f"{task}_16_{seed}_{part}.tsv"
                files.write_text(path, "".join(lines))
        text = "".join(f"Line {i} of task {number}. It goes on!\tx\n" for i in range(50))
        files.write_text(root / "full" / task / "train.tsv", text)


def test_only_what_the_experiment_reads_is_copied(tmp_path):
    write_gym(tmp_path, [*TASKS, "ag_news"])
    gym_gpu.shorten(tmp_path / "crossfit", tmp_path / "all")
    gym_gpu.shorten(tmp_path / "crossfit", tmp_path / "some", tasks_per_part=2)
    listed = {*PARTITION["train"], *PARTITION["test"]}
    copied = {path.name for path in (tmp_path / "all").iterdir()}
    assert copied == {*TASKS, "ag_news"} & listed
    assert {path.name for path in (tmp_path / "some").iterdir()} == {*TASKS[:2], *TASKS[4:6]}
    task = TASKS[0]
    names = sorted(path.name for path in (tmp_path / "all" / task).iterdir())
    assert names == sorted(
        [f"{task}_16_13_test.tsv"]
        + [f"{task}_16_{seed}_{part}.tsv" for seed in (13, 21) for part in ("train", "dev")]
    )
    source, copy = ((tmp_path / root / task).glob("*13_t*.tsv") for root in ("crossfit", "all"))
    for path, short in zip(sorted(source), sorted(copy), strict=True):
        lines, kept = path.read_text().splitlines(), short.read_text().splitlines()
        if "test" in path.name:
            assert kept == [lines[int(i * 300 / 128)] for i in range(128)]
        else:
            assert kept == lines
    with pytest.raises(UserError, match="holds no task of CrossFit's random partition"):
        gym_gpu.shorten(tmp_path, tmp_path / "none")


def test_a_bundle_returns_and_has_a_limit(tmp_path, capsys):
    root = tmp_path / "root"
    files.write_text(root / "a/b.txt", "text")
    files.write_text(root / "c.txt", "more")
    gym_gpu.pack(tmp_path / "out/x.tar.xz", root, ["a", "c.txt", "absent"], 10_000)
    gym_gpu.unpack(tmp_path / "out/x.tar.xz", tmp_path / "back")
    found = {p.relative_to(tmp_path / "back").as_posix(): p.read_text()
             for p in (tmp_path / "back").rglob("*.txt")}  # fmt: skip
    assert found == {"a/b.txt": "text", "c.txt": "more"}
    with pytest.raises(UserError, match=r"x\.tar\.xz has 0\.0 MB, more than 0"):
        gym_gpu.pack(tmp_path / "out/x.tar.xz", root, ["a"], 10)
    (tmp_path / "bad.tar.xz").write_bytes(b"no archive")
    with pytest.raises(UserError, match=r"cannot read .*bad\.tar\.xz"):
        gym_gpu.unpack(tmp_path / "bad.tar.xz", tmp_path / "back")


@pytest.mark.slow
def test_it_is_prepared_once_and_runs_without_its_sources(tmp_path):
    write_gym(tmp_path, TASKS)
    bundle, results = tmp_path / "bundle.tar.xz", tmp_path / "results.tar.xz"

    def call(*arguments):
        command = [sys.executable, "-m", "benchmarks.gym_gpu", *map(str, arguments), "--tiny"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
        assert done.returncode == 0, done.stderr[-3000:]
        return done

    call("prepare", bundle, f"--crossfit_dir={tmp_path}/crossfit", f"--full_dir={tmp_path}/full")
    (tmp_path / "full").rename(tmp_path / "gone")
    done = call("run", bundle, results)
    assert "preparing" not in done.stderr and "prepared" not in done.stderr
    with tarfile.open(results) as tar:
        names = tar.getnames()
        assert "run/results.json" in names and "run/report/index.html" in names
        assert not any("checkpoints" in name for name in names)
        tar.extractall(tmp_path / "out", filter="data")
    found = files.read_json(tmp_path / "out/run/results.json")
    assert list(found["arms"]) == ["direct", "dense", "routed"]
    assert {row["task"] for row in found["scores"]["zero_shot"]} == {
        "crossfit_" + task.replace("-", "_") for task in TASKS[4:]
    }
    with tarfile.open(bundle) as tar:
        assert any(name.startswith("compiled/") for name in tar.getnames())
