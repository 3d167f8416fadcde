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
from collections.abc import Iterable, Iterator
from typing import Annotated, Literal

import jax
import numpy as np

from moe_jax.core import files, paths
from moe_jax.core.configuration import Configuration, Name, PathName, Text
from moe_jax.core.errors import UserError, nearest, say
from moe_jax.core.sharding import make_mesh
from moe_jax.data.packing import encode_inputs
from moe_jax.data.vocabulary import load_vocabulary
from moe_jax.evaluation.evaluator import Evaluator
from moe_jax.evaluation.inference import Mode, inferences
from moe_jax.evaluation.scores import route_json
from moe_jax.model.task_moe import parameter_shardings
from moe_jax.runs import configurables, flags
from moe_jax.runs.config import Config
from moe_jax.runs.load import load_run, with_tasks
from moe_jax.runs.mixtures import prepare_mixtures, run_vocabulary, trained_mixture
from moe_jax.unseen.descriptions import Descriptions
from moe_jax.unseen.zero_shot import Resemblance, routes_of_new, trained_on

Line = tuple[int, str]  # number, from 1, and text


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
        params = jax.device_put(run.params, parameter_shardings(run.model, mesh))
        evaluator = Evaluator(
            run.model, vocabulary, data.lengths, run_config.eval_batch_rows, mesh, config.decoding
        )
        routes = np.asarray(evaluator.routes(params, run.step)) if run.model.routed else None
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
    lines = _lines(settings.input) if settings.input == "-" else list(_lines(settings.input))
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
    rows = run_config.eval_batch_rows
    mesh = make_mesh(config.mesh)

    def answers() -> Iterator[dict]:
        table = np.asarray(evaluator.routes(params, run.step)) if run.model.routed else None
        row_R, limit, cut = np.full(rows, run.task_ids[task]), data.lengths["inputs"], []
        for numbered in _batches(lines, rows):
            texts = [text for _, text in numbered]
            filled = [*texts, *[""] * (rows - len(texts))]
            arrays = encode_inputs(vocabulary, filled, limit)
            arrays["input_segments"][len(texts) :] = 0
            full_R = arrays["input_segments"].all(1)
            cut += [n for (n, text), full in zip(numbered, full_R, strict=False)
                    if full and len(vocabulary.inputs.encode(text)) >= limit]  # fmt: skip
            if resemblance is not None:
                table, row_R = resemblance.of_rows(arrays), np.arange(rows)
            # Lines, like examples, are numbered from 0 where they seed sampling.
            line_R = numbered[0][0] - 1 + np.arange(rows)
            predictions = evaluator.predict(params, table, row_R, arrays, line_R)
            shown = zip(numbered, predictions, row_R, strict=False)
            for (number, text), prediction, row in shown:
                inputs = {"inputs_pretokenized": text}
                route = None if table is None else route_json(table[row])
                yield {"inputs": inputs, "prediction": prediction, "line": number, "route": route}
        if cut:
            more = f", and {len(cut) - 1} more" if len(cut) > 1 else ""
            say(f"TASK_FEATURE_LENGTHS cuts inputs after {limit} tokens: line {cut[0]}{more}")

    with jax.set_mesh(mesh):
        resemblance, alike = None, {}
        if representations is None and task not in run.task_ids:
            if settings.unseen == "input" and run.model.routed:
                trained = trained_mixture(run_config.model_dir, data)
                resemblance = Resemblance(run, trained, data.lengths, rows, mesh)
            else:
                new = {task: mixture}
                alike, _ = routes_of_new(run, new, settings.unseen, config, "", mesh)
        run = with_tasks(run, [task], representations, alike)
        params = jax.device_put(run.params, parameter_shardings(run.model, mesh))
        evaluator = Evaluator(run.model, vocabulary, data.lengths, rows, mesh, config.decoding)
        _write(output, answers())


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


def _batches(lines: Iterable[Line], rows: int) -> Iterator[list[Line]]:
    """Lists of so many lines; those before a bad one come before its error."""
    batch: list[Line] = []
    try:
        for line in lines:
            batch.append(line)
            if len(batch) == rows:
                yield batch
                batch = []
    except UserError:
        if batch:
            yield batch
        raise
    if batch:
        yield batch


def _lines(path: str) -> Iterator[Line]:
    """(number, text) of every line, without the byte order mark and carriage returns of Windows.

    Raises:
        UserError: the file cannot be read, or a line is no UTF-8: when that line is reached.
    """
    try:
        with sys.stdin.buffer if path == "-" else paths.parse(path).open("rb") as f:
            for number, line in enumerate(f, 1):
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                try:
                    yield number, line.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8")
                except UnicodeDecodeError as e:
                    raise UserError(f"{path}:{number}: the line is not UTF-8") from e
    except paths.errors() as e:
        raise UserError(f"cannot read {path}: {paths.reason(e)}") from e


if __name__ == "__main__":
    flags.run(infer, Config, InferConfig, from_model_dir=True)
