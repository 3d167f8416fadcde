"""Answers inputs as one task of a trained model.

    echo "question" | python -m moe_jax.infer --gin.MODEL_DIR=/tmp/stage2 \\
        --gin.infer.task=skills_capital_of [--gin.infer.input=FILE] [--gin.infer.output=FILE]

Inputs are read one per line, which ends at a line feed. For each, a JSON line is written:
{"inputs": {"inputs_pretokenized"}, "prediction", "line" (its number, from 1), "route"}. A route is
the expert of every routed layer, encoder first, or all experts' weights; null for a dense model.

With infer.split=SPLIT the examples of the tasks of MIXTURE_OR_TASK_NAME, or of infer.task alone,
are answered instead, in the form of T5X's `infer`: a file TASK-MODE.jsonl-00000-of-00001 of each in
the directory infer.output. infer.mode is `predict`, `score` (the log-likelihoods of the targets) or
`predict_with_aux` (answers with their log-likelihoods).

MODEL_DIR may name one of a run's checkpoints, RUN/checkpoints/STEP. A task that the model was not
trained on is answered zero-shot: its representation is its own from a file that `represent` made
(infer.representations=FILE), or the mean where it is a task of MIXTURE_OR_TASK_NAME. With
infer.unseen='input' each of its inputs takes the route of the training task that it resembles most,
as in `eval`. A task that is registered nowhere can be described (infer.description='Give the
capital of the country.'): it takes the route of the training task with the most similar
description.
"""

import collections
import dataclasses
import sys
from collections.abc import Iterable
from typing import Annotated, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from moe_jax.core import files, paths
from moe_jax.core.configuration import Configuration, Name, PathName, Text
from moe_jax.core.errors import UserError, nearest, say
from moe_jax.core.sharding import make_mesh
from moe_jax.data.vocabulary import Vocabulary, load_vocabulary
from moe_jax.evaluation.evaluator import Evaluator
from moe_jax.evaluation.inference import Mode, inferences
from moe_jax.evaluation.lines import Line, line_answers, read_lines
from moe_jax.model.experts import Params
from moe_jax.model.task_moe import parameter_shardings
from moe_jax.runs import configurables, flags
from moe_jax.runs.config import Config
from moe_jax.runs.load import Run, load_run, with_tasks
from moe_jax.runs.mixtures import prepare_mixtures, run_vocabulary, trained_mixture
from moe_jax.unseen.descriptions import Descriptions
from moe_jax.unseen.zero_shot import Resemblance, routes_of_new, trained_on


@dataclasses.dataclass(frozen=True)
class InferConfig(Configuration, called="infer"):
    """Settings of this command.

    Attributes:
        task: the task whose route is used.
        input: file with one input per line, or - for standard input.
        output: file of JSON lines, or - for standard output. With `split` a directory, or - for
            standard output.
        split: answers the examples of this split in place of lines.
        mode: what T5X's `infer` calls so; only with `split`.
        description: what the task asks for, in place of `task`: lines are answered by the route of
            the training task with the most similar description.
        representations: file with the representation of a task that the model was not trained on.
        unseen: otherwise, the route of such a task: that of the `mean` representation, that of the
            training task with the nearest `description`, or for every `input` that of the training
            task nearest to it.
    """

    task: Name | None = None
    input: PathName = "-"
    output: PathName = "-"
    split: Name | None = None
    mode: Mode = "predict"
    description: Annotated[str, Text(0, 4096)] = ""
    representations: PathName | None = None
    unseen: Literal["mean", "description", "input"] = "mean"


configurables.register(InferConfig)


def infer(config: Config, settings: InferConfig) -> None:
    """Answers the lines of a file, or the examples of a split.

    Raises:
        UserError: settings do not go together, or see `infer_lines` and `infer_split`.
    """
    others = (settings.task, settings.split, settings.representations)
    if settings.description and any(other is not None for other in others):
        raise UserError(
            "infer.description replaces infer.task and infer.representations, and describes lines:"
            " give it alone"
        )
    if settings.split is not None:
        if settings.input != "-":
            raise UserError("infer.input and infer.split: give one of them")
        infer_split(config, settings)
    elif settings.mode != "predict":
        raise UserError(f"infer.mode {settings.mode!r} needs infer.split: lines have no targets")
    else:
        infer_lines(config, settings)


def infer_split(config: Config, settings: InferConfig) -> None:
    """Answers the examples of the tasks of MIXTURE_OR_TASK_NAME that have the split.

    Raises:
        UserError: no task has it, or there is no such task.
    """
    if settings.output != "-" and paths.parse(settings.output).is_file():
        raise UserError(
            f"infer.output {settings.output} is a file; answers to a split are files in a directory"
        )
    run_config, data, split = config.run, config.data, settings.split
    mixture = prepare_mixtures(data, run=run_config.model_dir)[data.mixture_or_task_name]
    if settings.task is not None:
        names = [mixture.task(settings.task).name]
    else:
        names = [task.name for task in mixture.with_split(split)]
    vocabulary = mixture.vocabulary
    run = load_run(run_config.model_dir, config.model, config.router, vocabulary.size)
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        found = () if settings.representations else names
        new = {name: mixture for name in found if name not in run.task_ids}
        alike, given = routes_of_new(run, new, settings.unseen, config, split, mesh)
        run = with_tasks(run, names, settings.representations, alike)
        evaluator, params, routes = _loaded(config, run, vocabulary, mesh)
        for name in names:
            table, row = routes, run.task_ids[name]
            if name in given:
                table, row = given[name], np.arange(len(given[name]))
            answers = inferences(evaluator, params, table, mixture, name, row, split, settings.mode)
            file = f"{name}-{settings.mode}.jsonl-00000-of-00001"
            _write(settings.output, answers, file)


def infer_lines(config: Config, settings: InferConfig) -> None:
    """Answers the lines of a file as one task.

    Raises:
        UserError: the task is in none of the task table, the file and MIXTURE_OR_TASK_NAME.
    """
    if settings.task is None and not settings.description:
        raise UserError(
            "infer.task is not set: give --gin.infer.task=NAME, such as one of"
            f" {config.run.model_dir}/task_table.json, or describe the task with"
            " --gin.infer.description='...'"
        )
    if settings.output != "-" and paths.parse(settings.output).is_dir():
        raise UserError(
            f"infer.output {settings.output} is a directory; answers to lines are a file"
        )
    # A file is looked through before the work; standard input is answered as it comes.
    lines: Iterable[Line] = read_lines(settings.input)
    if settings.input != "-":
        lines = list(lines)
    task, output, representations = settings.task, settings.output, settings.representations
    run_config, data = config.run, config.data
    # What it was trained on is looked at only where the run itself does not say enough.
    own, mixture = run_vocabulary(run_config.model_dir), None
    if own is None:
        mixture = prepare_mixtures(data)[data.mixture_or_task_name]
    vocabulary = load_vocabulary(own) if own is not None else mixture.vocabulary
    run = load_run(run_config.model_dir, config.model, config.router, vocabulary.size)
    known = dict.fromkeys(run.task_ids)
    if task is None:
        trained = trained_mixture(run_config.model_dir, data)
        task = Descriptions(trained_on(run, trained)).nearest(settings.description)
        say(f"answers by the route of {task}, whose description is most similar")
    if task not in known and representations is None:
        if mixture is None:
            mixture = prepare_mixtures(data, run=run_config.model_dir)[data.mixture_or_task_name]
        known |= dict.fromkeys(mixture.names)
    if task not in known and representations is None:
        raise UserError(
            f"the task table has no {task!r}; a task that the model was not trained on needs"
            " infer.representations=FILE, which has its row, or MIXTURE_OR_TASK_NAME=NAME, which"
            f" has the task{nearest(task, known)}"
        )
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        of_rows, alike = None, {}
        if representations is None and task not in run.task_ids:
            if settings.unseen == "input" and run.model.routed:
                trained = trained_mixture(run_config.model_dir, data)
                rows = run_config.eval_batch_rows
                of_rows = Resemblance(run, trained, data.lengths, rows, mesh).of_rows
            else:
                new = {task: mixture}
                alike, _ = routes_of_new(run, new, settings.unseen, config, "", mesh)
        run = with_tasks(run, [task], representations, alike)
        evaluator, params, routes = _loaded(config, run, vocabulary, mesh)
        row = run.task_ids[task]
        _write(output, line_answers(evaluator, params, lines, routes, row, of_rows))


def _loaded(
    config: Config, run: Run, vocabulary: Vocabulary, mesh: Mesh
) -> tuple[Evaluator, Params, np.ndarray | None]:
    """(what answers, parameters on the devices, routes [T, N, E] of the task table or None)."""
    params = jax.device_put(run.params, parameter_shardings(run.model, mesh))
    evaluator = Evaluator(
        run.model, vocabulary, config.data.lengths, config.run.eval_batch_rows, mesh,
        config.decoding,
    )  # fmt: skip
    routes = np.asarray(evaluator.routes(params, run.step)) if run.model.routed else None
    return evaluator, params, routes


def _write(output: str, answers: Iterable[dict], file: str = "") -> None:
    """Writes to standard output as answers come, or to `file` in `output`. Of several processes,
    all answer and the first one writes."""
    if jax.process_index():
        collections.deque(answers, maxlen=0)
        return None
    if output != "-":
        place = paths.parse(output) / file if file else output
        files.write_jsonl(place, answers)
        return say(f"wrote {place}")
    for answer in answers:
        sys.stdout.write(files.json_line(answer))
        sys.stdout.flush()


if __name__ == "__main__":
    flags.run(infer, Config, InferConfig, from_model_dir=True)
