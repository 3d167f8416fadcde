"""Scores a trained model on the tasks of a mixture.

    python -m moe_jax.eval --gin.MODEL_DIR=/tmp/stage2 [--gin.MIXTURE_OR_TASK_NAME=NAME] \
        [--gin.eval.split=test] [--gin.eval.examples=100]

Writes MODEL_DIR/eval/NAME_SPLIT/{scores,predictions}.jsonl. A task that the model was not trained
on is scored zero-shot; in a mixture of experts it takes the mean representation, or its own from a
file that `represent` made (eval.representations=FILE).
"""

from collections.abc import Sequence
from pathlib import Path

import gin
import jax

from moe_jax.core.sharding import MeshConfig, make_mesh
from moe_jax.evaluation.evaluator import Evaluator, TaskScore, mean_score, write_scores
from moe_jax.model.config import ModelConfig, RouterConfig
from moe_jax.runs import flags as cli
from moe_jax.runs.config import DataConfig, RunConfig
from moe_jax.runs.load import load_run, with_tasks
from moe_jax.train import prepare_mixtures


@gin.configurable("eval")
def evaluate(
    split: str = "test",
    examples: int | None = None,
    mixtures: Sequence[str] = (),
    representations: str | None = None,
) -> None:
    """Scores the run in MODEL_DIR.

    Args:
        split: of every task; tasks without it are left out.
        examples: at most this many per task, evenly spaced.
        mixtures: further mixtures to score, each into a directory of its own.
        representations: file with those of the tasks that the model was not trained on.
    """
    run_config, data = RunConfig(), DataConfig()
    found = prepare_mixtures(data, *mixtures)
    vocabulary = found[data.mixture_or_task_name].vocabulary
    run = load_run(run_config.model_dir, ModelConfig(), RouterConfig(), vocabulary.size)
    names = [name for mixture in found.values() for name in mixture.names]
    run = with_tasks(run, names, representations)
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        evaluator = Evaluator(run.model, vocabulary, data.lengths, run_config.eval_batch_rows, mesh)
        for mixture in found.values():
            scores = evaluator.tasks(run.params, run.step, mixture, run.task_ids, split, examples)
            if jax.process_index() == 0:
                directory = Path(run_config.model_dir) / "eval" / f"{mixture.name}_{split}"
                write_scores(directory, scores)
                _show(scores, directory)


def _show(scores: list[TaskScore], directory: Path) -> None:
    for score in scores:
        print(f"{score.task.name:<40} {score.metric:<20} {score.score:.3f}")
    print(f"mean over {len(scores)} tasks: {mean_score(scores):.4f}; written to {directory}")


if __name__ == "__main__":
    cli.run(evaluate, from_model_dir=True)
