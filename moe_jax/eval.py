"""Scores a trained model on the tasks of a mixture.

    python -m moe_jax.eval --gin.MODEL_DIR=/tmp/stage2 [--gin.MIXTURE_OR_TASK_NAME=NAME] \\
        [--gin.eval.split=test] [--gin.eval.examples=100]

Writes MODEL_DIR/eval/NAME_SPLIT/{scores,predictions}.jsonl, and prompts.jsonl where tasks are
prompts of one dataset. MODEL_DIR may name one of a run's checkpoints, RUN/checkpoints/STEP: its
scores go to RUN/eval/step_STEP/. The mixtures of EVAL_MIXTURES are scored as well.

A task that the model was not trained on is scored zero-shot. In a mixture of experts it takes the
route of the training task whose inputs are most similar (with eval.unseen='description', whose
description is), another one that eval.unseen chooses, or that of its representation in a file that
`represent` made (eval.representations=FILE). With eval.disable_examples=N there is also
disabling.json: the loss of every task with each expert off in turn. eval.without="('decoder.5.2',)"
scores all tasks without these experts, into eval/NAME_SPLIT_without_decoder.5.2/. The names of many
experts are a hash there, and its without.json lists them.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import jax
import numpy as np

from moe_jax.core import checksums, files, paths
from moe_jax.core.configuration import INT32, Configuration, Examples, Name, Names, PathName, Range
from moe_jax.core.errors import UserError, say
from moe_jax.core.sharding import make_mesh
from moe_jax.evaluation.disabling import disabling, experts_named, preferences, without
from moe_jax.evaluation.evaluator import Evaluator, ScoringError, tasks_with_split
from moe_jax.evaluation.functions import try_functions
from moe_jax.evaluation.scores import (
    TaskScore,
    mean_score,
    over_prompts,
    write_predictions,
    write_scores,
)
from moe_jax.model.task_moe import parameter_shardings
from moe_jax.runs import configurables, directory, flags
from moe_jax.runs.config import Config
from moe_jax.runs.load import load_run, with_tasks
from moe_jax.runs.mixtures import prepare_mixtures, say_cut
from moe_jax.unseen.zero_shot import Unseen, new_tasks, routes_of_new

OFF = ("disable_examples", "without")  # settings that switch experts off


@dataclasses.dataclass(frozen=True)
class EvalConfig(Configuration, called="eval"):
    """Settings of this command.

    Attributes:
        split: the split to score; tasks without it are left out.
        examples: at most this many per task, evenly spaced; None for all.
        mixtures: further mixtures to score, each into a directory of its own.
        unseen: the route of a task that the model was not trained on: that of the `nearest`
            training task, by the text of the inputs; that of the training task with the nearest
            `description`; the mean of all routes, `weighted` by the inputs' similarity; for every
            `input` that of the training task nearest to it; or that of the `mean` representation.
        representations: file of representations for these tasks instead.
        disable_examples: with each expert of a mixture off in turn, the loss on at most this many
            examples of each task; 0 for none.
        without: experts of a mixture that are off: 'encoder.0.2' is expert 2 of the encoder's first
            layer, as routes.json names layers.
    """

    split: Name = "test"
    examples: Examples = None
    mixtures: Names = ()
    unseen: Unseen = "nearest"
    representations: PathName | None = None
    disable_examples: Annotated[int, Range(0, INT32)] = 0
    without: Names = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in OFF:
            if getattr(self, name) and self.unseen in ("weighted", "input"):
                raise UserError(
                    f"eval.{name} is {getattr(self, name)}, but with eval.unseen {self.unseen!r} a"
                    " task has no router's second choice in place of an expert"
                )


configurables.register(EvalConfig)


def evaluate(config: Config, settings: EvalConfig) -> None:
    """Scores the run in MODEL_DIR."""
    run_config, data, split = config.run, config.data, settings.split
    root = directory.root(run_config.model_dir)
    scored = root / "eval"
    asked = paths.absolute(run_config.model_dir)
    if root not in (asked, asked.parent):  # a step of its checkpoints
        scored /= f"step_{asked.name}"
    more = (*run_config.eval_mixtures, *settings.mixtures)
    mixtures = prepare_mixtures(data, *more, run=run_config.model_dir)
    vocabulary = mixtures[data.mixture_or_task_name].vocabulary
    for mixture in mixtures.values():
        try_functions(mixture, tasks_with_split(mixture, split), split)
        if jax.process_index() == 0:
            say_cut(mixture, split, data.lengths)
    run = load_run(run_config.model_dir, config.model, config.router, vocabulary.size)
    for name in OFF:
        if getattr(settings, name) and not run.model.routed:
            raise UserError(
                f"eval.{name} is {getattr(settings, name)}, but {run_config.model_dir} is a dense"
                " model: it has no experts to switch off"
            )
    off_NxE = experts_named(run.model, settings.without) if settings.without else None
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        new = {}
        if settings.representations is None:
            new = new_tasks(run.task_ids, mixtures.values(), split)
        nearest, given = routes_of_new(
            run, new, settings.unseen, config, split, mesh, settings.examples
        )
        alike = "description is" if settings.unseen == "description" else "inputs are"
        for task, trained in nearest.items() if jax.process_index() == 0 else ():
            say(f"{task} takes the route of {trained}, whose {alike} most similar")
        names = [task.name for m in mixtures.values() for task in m.with_split(split)]
        run = with_tasks(run, names, settings.representations, nearest)
        params = jax.device_put(run.params, parameter_shardings(run.model, mesh))
        evaluator = Evaluator(
            run.model, vocabulary, data.lengths, run_config.eval_batch_rows, mesh, config.decoding
        )
        ending = split
        if off_NxE is not None:
            ending += f"_without_{_named(settings.without)}"
            routes_TxNxE = np.asarray(evaluator.routes(params, run.step))
            liked_TxNxE = preferences(run.model, params, run.step)
            given = {
                name: without(routes_TxNxE[task], liked_TxNxE[task], off_NxE)
                for name, task in run.task_ids.items()
            }
        for mixture in mixtures.values():
            place = scored / f"{mixture.name}_{ending}"
            try:
                scores = evaluator.tasks(
                    params, run.step, mixture, run.task_ids, split, settings.examples, given=given
                )
            except ScoringError as e:
                if jax.process_index() == 0:
                    write_predictions(place, e.predictions)
                raise UserError(f"{e}; the answers so far are in {place}/predictions.jsonl") from e
            if jax.process_index() == 0:
                write_scores(place, scores)
                if settings.without:
                    files.write_json(place / "without.json", list(settings.without))
                _show(scores, place)
            if settings.disable_examples:
                found = disabling(
                    evaluator, params, run.step, mixture, run.task_ids, split,
                    settings.disable_examples,
                )  # fmt: skip
                if jax.process_index() == 0:
                    files.write_json(place / "disabling.json", found)


def _named(without: Sequence[str]) -> str:
    """Experts in the name of a directory: many by a hash, as a name has at most 255 bytes."""
    name = "_".join(without)
    return name if len(name) <= 100 else f"{len(without)}_experts_{checksums.digest(name)}"


def _show(scores: list[TaskScore], place: Path) -> None:
    for score in scores:
        print(f"{score.task.name:<40} {score.metric:<20} {score.score:.3f}")
    for row in over_prompts(scores):
        print(
            f"{row['dataset']:<40} {row['metric']:<20} mean {row['mean']:.3f}, median"
            f" {row['median']:.3f} over {row['prompts']} prompts"
        )
    print(f"mean over {len(scores)} tasks: {mean_score(scores):.4f}; written to {place}")


if __name__ == "__main__":
    flags.run(evaluate, Config, EvalConfig, from_model_dir=True)
