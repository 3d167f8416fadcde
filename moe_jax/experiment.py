"""Runs a whole experiment: data, training, scores, few-shot adaptation, report.

    python -m moe_jax.experiment --gin_file=experiments/quickstart.gin \\
        --gin.MODEL_DIR=runs/quickstart

Every stage is one of this package's commands. It is printed before it runs, and has its own
directory under MODEL_DIR. Started again, the experiment skips finished stages and continues an
interrupted one where it stopped. Macros given on this command line are passed to every stage that
has a gin file.
"""

import dataclasses
import hashlib
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from moe_jax.core import files, paths, processes
from moe_jax.core.configuration import INT32, Configuration, Examples, Range, Text
from moe_jax.core.errors import UserError
from moe_jax.runs import configurables, flags
from moe_jax.runs.config import RunConfig

DONE = "done.json"
Setting = Annotated[str, Text(0, 4096)]


@dataclasses.dataclass(frozen=True)
class ExperimentConfig(Configuration, called="experiment"):
    """Settings of this command.

    Attributes:
        model: gin file of the model, read first by every stage.
        dense: gin file of the dense baseline.
        stage1: gin file of the mixture's first stage.
        stage2: gin file of its second stage; '' if the mixture has only one.
        finetune: gin file of the few-shot adaptation.
        unseen: the mixture of unseen tasks.
        upcycle_step: the experts of stage 1 start as copies of the dense model at this step, of
            which there must be a checkpoint (RunConfig.checkpoint_period). With as many steps in
            stage 1 as the dense model has left, both see the same number of examples. With 0, stage
            1 starts from fresh weights.
        stage2_from_dense: stage 2 starts its experts from the dense model, not from fresh weights.
        eval_examples: at most this many test examples of each task, evenly spaced, in the scores of
            the trained models; None for all. (Few-shot: FinetuneConfig.test_examples.)
        disable_examples: with each expert of the mixture off in turn, the loss on at most this many
            test examples of each task; 0 for none.
    """

    model: Setting = ""
    dense: Setting = ""
    stage1: Setting = ""
    stage2: Setting = ""
    finetune: Setting = ""
    unseen: Setting = ""
    upcycle_step: Annotated[int, Range(0, INT32)] = 0
    stage2_from_dense: bool = False
    eval_examples: Examples = None
    disable_examples: Annotated[int, Range(0, INT32)] = 32


configurables.register(ExperimentConfig)


def experiment(run: RunConfig, settings: ExperimentConfig) -> None:
    """Runs all stages.

    Raises:
        UserError: a setting is missing, or a stage failed.
    """
    for name in ("model", "dense", "stage1", "finetune", "unseen"):
        if not getattr(settings, name):
            raise UserError(
                f"experiment.{name} is not set: give an experiment's gin file, such as "
                "--gin_file=experiments/quickstart.gin"
            )
    run.require("model_dir")
    with processes.lock(run.model_dir):
        _run_stages(paths.parse(run.model_dir), settings)


def _run_stages(root: Path, settings: ExperimentConfig) -> None:
    begin = time.perf_counter()
    at = {name: str(root / name) for name in ("dense", "stage1", "stage2", "few_shot", "report")}
    stages = Stages(root, settings.model)

    stages.run("prepare", "prepare", settings.dense, {"prepare.mixtures": repr((settings.unseen,))})
    stages.run("dense", "train", settings.dense, {"MODEL_DIR": at["dense"]})
    bindings = {"MODEL_DIR": at["stage1"]}
    if settings.upcycle_step:
        start = paths.parse(at["dense"]) / "checkpoints" / str(settings.upcycle_step)
        bindings["INITIAL_CHECKPOINT_PATH"] = str(start)
    stages.run("stage1", "train", settings.stage1, bindings)
    mixture = "stage1"
    if settings.stage2:
        mixture = "stage2"
        bindings = {"MODEL_DIR": at["stage2"], "ROUTER_CHECKPOINT_PATH": at["stage1"]}
        if settings.stage2_from_dense:
            bindings["INITIAL_CHECKPOINT_PATH"] = at["dense"]
        stages.run("stage2", "train", settings.stage2, bindings)
    for name in ("dense", mixture):
        both = {"MODEL_DIR": at[name], "eval.mixtures": repr((settings.unseen,))}
        if settings.eval_examples is not None:
            both["eval.examples"] = str(settings.eval_examples)
        if name == mixture and settings.disable_examples:
            both["eval.disable_examples"] = str(settings.disable_examples)
        stages.run(f"scores of {name}", "eval", None, both)
    stages.run(
        "few_shot",
        "finetune",
        settings.finetune,
        {"MODEL_DIR": at["few_shot"], "DENSE_DIR": at["dense"], "MOE_DIR": at[mixture]},
    )

    from moe_jax.report.build import report  # scikit-learn

    names = dict.fromkeys(("dense", "stage1", mixture))
    result = report(at["report"], {n: at[n] for n in names}, at["few_shot"], model=mixture)
    print("\nResults:")
    for finding in result.findings:
        print(f"- {finding}")
    print(f"\n{time.perf_counter() - begin:.0f} s in all; the report is {result.page}")


class Stages:
    """Runs commands in order. A finished stage runs again only if its inputs or predecessors
    changed."""

    def __init__(self, root: Path, model: str):
        self._path = root / DONE
        self._done = files.read_json(self._path) if self._path.exists() else {}
        self._model = model
        self._history = hashlib.sha256()

    def run(self, name: str, module: str, gin_file: str | None, bindings: dict[str, str]) -> None:
        """Runs `python -m moe_jax.MODULE` unless the stage is finished.

        Raises:
            UserError: the command failed; its output is above the message.
        """
        arguments = []
        if gin_file is not None:  # without one, the stage reads a run's config.gin
            arguments = [f"--gin_file={self._model}", f"--gin_file={gin_file}"]
            given = flags.given_bindings()
            given = {k: v for k, v in given if not k.startswith("experiment.")}
            bindings = {**given, **bindings}
        arguments += [f"--gin.{key}={value}" for key, value in bindings.items()]
        self._history.update(repr((module, arguments)).encode())
        for file in (self._model, gin_file):
            if file is not None:
                self._history.update(flags.find_gin_file(file).read_bytes())
        fingerprint = self._history.hexdigest()
        print(f"\n== {name}\n$ python -m moe_jax.{module} {shlex.join(arguments)}", flush=True)
        if self._done.get(name) == fingerprint:
            print("done before")
            return
        begin = time.perf_counter()
        self._call(
            [sys.executable, "-m", f"moe_jax.{module}", *flags.process_flags(), *arguments], name
        )
        self._done[name] = fingerprint
        files.write_json(self._path, self._done)
        print(f"{time.perf_counter() - begin:.0f} s", flush=True)

    @staticmethod
    def _call(command: Sequence[str], name: str) -> None:
        code = processes.call(command)
        if code:
            raise UserError(f"{name} failed with exit code {code}: see above")


if __name__ == "__main__":
    flags.run(experiment, RunConfig, ExperimentConfig)
