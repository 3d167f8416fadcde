"""Runs a whole experiment: data, training, scores, few-shot adaptation, report.

    python -m moe_jax.experiment --gin_file=experiments/quickstart.gin \\
        --gin.MODEL_DIR=runs/quickstart

Makes every arm (experiment.arms) once for each seed (experiment.seeds). Every stage is one of this
package's commands, is printed before it runs, and has its own directory under MODEL_DIR. Started
again, the experiment skips finished stages and continues an interrupted one where it stopped; what
was made from other settings or data is set aside and made again. Macros given on this command line
are passed to every stage that has a gin file. Writes MODEL_DIR/results.json, all scores and paired
comparisons of all arms, and MODEL_DIR/report, which is about the first seed's mixture.
"""

import time
from pathlib import Path

import jax

from moe_jax.core import paths, processes
from moe_jax.core.errors import UserError
from moe_jax.experiments.arms import DENSE, ROUTED
from moe_jax.experiments.config import ExperimentConfig
from moe_jax.experiments.plan import Plan
from moe_jax.experiments.results import RESULTS, text_tables, write_results
from moe_jax.experiments.stages import clock, run_stages
from moe_jax.report.build import report
from moe_jax.report.names import named
from moe_jax.runs import configurables, flags
from moe_jax.runs.config import RunConfig

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
        _experiment(paths.local(run.model_dir), settings)


def _experiment(root: Path, settings: ExperimentConfig) -> None:
    begin = time.perf_counter()
    jax.config.update("jax_platforms", "cpu")  # accelerators are the stages' own
    plan = Plan(root, settings)
    stages = {seed: plan.stages(seed) for seed in settings.seeds}
    last = {of_seed[-1].name: seed for seed, of_seed in stages.items()}
    seeds: list[int] = []
    for stage in run_stages(root, [stage for of_seed in stages.values() for stage in of_seed]):
        if stage.name in last:
            seeds.append(last[stage.name])
            # Also the results so far, while later seeds are made.
            results = write_results(plan, seeds)
    first = seeds[0]
    runs, model = {named(DENSE): plan.place(first, DENSE)}, None
    if ROUTED in plan.arms:
        model = named(ROUTED)
        if settings.stage2:
            runs[f"{model} stage 1"] = plan.place(first, f"{ROUTED}_stage1")
        runs[model] = plan.place(first, ROUTED)
    made = report(
        root / "report", runs, plan.place(first, "few_shot"), model=model, experiment=results
    )
    print("\n" + "\n".join(text_tables(results)))
    print("Results:")
    for finding in made.summary:
        print(f"- {finding}")
    print(f"\n{clock(time.perf_counter() - begin)} in all; the report is {made.page},")
    print(f"all numbers are in {root / RESULTS}")


if __name__ == "__main__":
    flags.run(experiment, RunConfig, ExperimentConfig)
