"""Stages run once, again when their inputs change, and are taken back when those come back."""

import dataclasses

import pytest

from moe_jax.core import files
from moe_jax.experiments.stages import (
    RECORD,
    Stage,
    clock,
    fingerprints,
    read_record,
    run_stages,
    time_left,
)


class Experiment:
    """Stages a -> b and c, which write their input into their directory; `ran` lists them."""

    def __init__(self, root):
        self.root, self.ran, self.fails = root, [], ""

    def stages(self, **inputs):
        parents = {"s/a": (), "s/a/b": ("s/a",), "s/c": ()}
        return [
            Stage(
                name, "kind", inputs.get(name[-1], 0), of, lambda n=name: self.work(n, inputs), ""
            )
            for name, of in parents.items()
        ]

    def work(self, name, inputs):
        self.ran.append(name)
        if name == self.fails:
            raise RuntimeError(name)
        files.write_text(self.root / name / "outcome", str(inputs.get(name[-1], 0)))

    def run(self, **inputs):
        """The stages that ran."""
        self.ran = []
        names = [stage.name for stage in run_stages(self.root, self.stages(**inputs))]
        assert names == ["s/a", "s/a/b", "s/c"]
        return self.ran


def test_a_stage_runs_again_only_if_what_it_was_made_from_changed(tmp_path):
    experiment = Experiment(tmp_path)
    assert experiment.run() == ["s/a", "s/a/b", "s/c"]
    assert experiment.run() == []
    assert experiment.run(b=1) == ["s/a/b"]
    assert experiment.run(b=1, a=2) == ["s/a", "s/a/b"]  # a child is made from its parent
    assert (tmp_path / "s/a/outcome").read_text() == "2"


def test_what_was_set_aside_is_taken_back(tmp_path, capsys):
    experiment = Experiment(tmp_path)
    experiment.run()
    experiment.run(a=1)
    assert len(list((tmp_path / "s").glob("a.*"))) == 1
    assert f"the inputs of {tmp_path}/s/a changed: it is made again" in capsys.readouterr().err
    assert experiment.run() == []
    assert (tmp_path / "s/a/outcome").read_text() == "0"
    assert (tmp_path / "s/a/b/outcome").read_text() == "0"
    assert experiment.run(a=1) == []
    assert (tmp_path / "s/a/outcome").read_text() == "1"


def test_an_interrupted_stage_goes_on_in_its_directory(tmp_path):
    experiment = Experiment(tmp_path)
    experiment.fails = "s/a/b"
    with pytest.raises(RuntimeError):
        experiment.run()
    files.write_text(tmp_path / "s/a/b/half", "")
    experiment.fails = ""
    assert experiment.run() == ["s/a/b", "s/c"]
    assert (tmp_path / "s/a/b/half").exists()
    # How long the whole would have taken is not known.
    assert read_record(tmp_path / "s/a/b")["seconds"] is None
    assert read_record(tmp_path / "s/c")["seconds"] >= 0


def test_fingerprints_follow_the_parents():
    stages = Experiment(None).stages()
    before = fingerprints(stages)
    other = [dataclasses.replace(s, inputs=1) if s.name == "s/a" else s for s in stages]
    changed = {name for name, value in fingerprints(other).items() if value != before[name]}
    assert changed == {"s/a", "s/a/b"}


def test_the_time_left_is_that_of_the_same_stage_then_of_its_kind():
    def stage(name, kind, work=1.0):
        return Stage(name, kind, 0, (), lambda: None, "", work)

    stages = [
        stage("seed_0/dense", "train", 100), stage("seed_0/wide", "train", 100),
        stage("seed_1/dense", "train", 200), stage("seed_1/other", "train", 50),
        stage("seed_1/eval", "eval"),
    ]  # fmt: skip
    wanted = {s.name: s.name for s in stages}

    records = {s.name: {} for s in stages}
    assert time_left(stages, records, wanted) == ""
    # seed_0/dense took 10 s per 100 steps: of others of its kind 100 + 200 + 50 steps are left.
    records["seed_0/dense"] = {"done": True, "fingerprint": "seed_0/dense", "seconds": 10.0}
    assert time_left(stages, records, wanted) == ", more than 35 s left"
    # `wide` took thrice as long: dense by its own rate, 20 s; `other` by the mean, 10 s.
    records["seed_0/wide"] = {"done": True, "fingerprint": "seed_0/wide", "seconds": 30.0}
    assert time_left(stages, records, wanted) == ", more than 30 s left"
    records["seed_1/eval"] = {"done": True, "fingerprint": "seed_1/eval", "seconds": 7.0}
    assert time_left(stages, records, wanted) == ", about 30 s left"
    # What was made from other inputs is to be made again, and its time is not used.
    records["seed_0/wide"]["fingerprint"] = "another"
    assert time_left(stages, records, wanted) == ", about 35 s left"


def test_clock():
    assert [clock(s) for s in (3.2, 99.4, 100, 5999, 11100)] == [
        "3 s", "99 s", "2 min", "1 h 40 min", "3 h 5 min",
    ]  # fmt: skip


def test_a_record_is_what_says_that_a_stage_is_done(tmp_path):
    experiment = Experiment(tmp_path)
    experiment.run()
    (tmp_path / "s/c" / RECORD).unlink()
    assert experiment.run() == ["s/c"]
