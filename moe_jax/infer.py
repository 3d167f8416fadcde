"""Answers inputs as one task of a trained model.

    echo "question" | python -m moe_jax.infer --gin.MODEL_DIR=/tmp/stage2 \
        --gin.infer.task=skills_capital_of [--gin.infer.input=FILE] [--gin.infer.output=FILE]

Inputs are read one per line. For each, a JSON line is written: {"input", "prediction", "route"}.
A task that the model was not trained on is answered zero-shot, as in `eval`. Its representation
comes from a file that `represent` made (infer.representations=FILE). Without such a file, a task of
MIXTURE_OR_TASK_NAME gets the mean representation.
"""

import dataclasses
import sys
from collections.abc import Iterator
from itertools import islice

import jax
import numpy as np

from moe_jax.core import files
from moe_jax.core.errors import UserError, check_fields, nearest
from moe_jax.core.sharding import make_mesh
from moe_jax.data.packing import encode_inputs
from moe_jax.evaluation.evaluator import Evaluator
from moe_jax.evaluation.scores import route_json
from moe_jax.model.task_moe import parameter_shardings
from moe_jax.runs import configurables, flags
from moe_jax.runs.config import Config
from moe_jax.runs.load import load_run, with_tasks
from moe_jax.runs.mixtures import prepare_mixtures


@dataclasses.dataclass(frozen=True)
class InferConfig:
    """Settings of this command.

    Attributes:
        task: the task whose route is used.
        input: file with one input per line, or - for standard input.
        output: file of JSON lines, or - for standard output.
        representations: file with the representation of a task that the model was not trained on.
    """

    task: str | None = None
    input: str = "-"
    output: str = "-"
    representations: str | None = None

    def __post_init__(self) -> None:
        check_fields(self, "infer")


configurables.register(InferConfig, "infer")


def infer(config: Config, settings: InferConfig) -> None:
    """Decodes the lines of a file.

    Raises:
        UserError: the task is in none of the task table, the file and MIXTURE_OR_TASK_NAME.
    """
    if settings.task is None:
        raise UserError("infer.task is not set: give --gin.infer.task=NAME")
    task, output, representations = settings.task, settings.output, settings.representations
    run_config, data = config.run, config.data
    mixture = prepare_mixtures(data)[data.mixture_or_task_name]
    vocabulary = mixture.vocabulary
    run = load_run(run_config.model_dir, config.model, config.router, vocabulary.size)
    known = dict.fromkeys([*run.task_ids, *mixture.names])
    if task not in known and representations is None:
        raise UserError(
            f"the task table has no {task!r}; a task that the model was not trained on needs"
            " infer.representations=FILE, which has its row, or MIXTURE_OR_TASK_NAME=NAME, which"
            f" has the task{nearest(task, known)}"
        )
    run = with_tasks(run, [task], representations)
    task_id = run.task_ids[task]
    rows = run_config.eval_batch_rows
    mesh = make_mesh(config.mesh)

    def answers() -> Iterator[dict]:
        routes = evaluator.routes(params, run.step) if run.model.routed else None
        route = None if routes is None else route_json(np.asarray(routes)[task_id])
        lines = _lines(settings.input)
        while texts := list(islice(lines, rows)):
            filled = [*texts, *[""] * (rows - len(texts))]
            encoded = encode_inputs(vocabulary, filled, data.lengths["inputs"])
            arrays = {name: array[0] for name, array in encoded.items()}
            arrays["input_segments"][len(texts) :] = 0
            predictions = evaluator.predict(params, routes, task_id, arrays)
            for text, prediction in zip(texts, predictions, strict=False):
                yield {"input": text, "prediction": prediction, "route": route}

    with jax.set_mesh(mesh):
        params = jax.device_put(run.params, parameter_shardings(run.model, mesh))
        evaluator = Evaluator(run.model, vocabulary, data.lengths, rows, mesh, config.decoding)
        if output == "-":
            for answer in answers():
                sys.stdout.write(files.json_line(answer))
                sys.stdout.flush()
        else:
            files.write_jsonl(output, answers())


def _lines(path: str) -> Iterator[str]:
    try:
        with sys.stdin if path == "-" else open(path, encoding="utf-8") as f:
            for line in f:
                yield line.rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"cannot read {path}: {e}") from e


if __name__ == "__main__":
    flags.run(infer, Config, InferConfig, from_model_dir=True)
