"""A small experiment as a subprocess: it runs, and what is done is not run again."""

import pytest
from toy_run import bindings, finish, start

from moe_jax.core import files

ARMS = ("direct", "dense", "routed", "oracle", "average", "shuffled")


def write(path, model_dir, *without, **settings):
    lines = [line for line in bindings(model_dir, **settings) if not line.startswith(without)]
    path.write_text("\n".join(lines) + "\n")


def write_experiment(directory, arms):
    """Writes the gin files of one seed of the toy tasks; returns the command's arguments."""
    (directory / "model.gin").write_text("")
    run = {"TRAIN_STEPS": 4, "CHECKPOINT_PERIOD": 2}
    write(directory / "dense.gin", None, "MODEL_DIR", **run, ModelConfig__experts=1)
    routed = {"RouterConfig__selection": "argmax", "RouterConfig__experts_per_layer": 1}
    # What is the user's own: commands that read the run are given it, and import it for no other.
    (directory / "own.py").write_text("")
    own = {"EXTENSIONS": (str(directory / "own.py"),)}
    write(directory / "routed.gin", None, "MODEL_DIR", **run, **routed, **own)
    few_shot = {
        "MIXTURE_OR_TASK_NAME": "toy_unseen", "VocabularyConfig__trained_on": "toy_train",
        "FinetuneConfig__learning_rates": (1e-3,), "FinetuneConfig__batch_sizes": (4,),
        "FinetuneConfig__seeds": (13, 21), "FinetuneConfig__steps": 2,
    }  # fmt: skip
    write(directory / "few_shot.gin", None, "MODEL_DIR", "TRAIN", "Model", **few_shot)
    settings = {
        "model": "model.gin", "dense": "dense.gin", "stage1": "routed.gin",
        "finetune": "few_shot.gin", "unseen": "toy_unseen", "upcycle_step": 2, "arms": arms,
        "disable_examples": 2, "seeds": (5,),
    }  # fmt: skip
    lines = [f"experiment.{name} = {value!r}" for name, value in settings.items()]
    (directory / "all.gin").write_text("\n".join(lines) + "\n")
    root = directory / "run"
    return [f"--gin_search_paths={directory}", "--gin_file=all.gin", f"--gin.MODEL_DIR={root}"]


@pytest.mark.slow
def test_all_arms_are_made_scored_and_compared(tmp_path):
    """One seed of the toy tasks; a second call only reads, a changed setting runs its stages."""
    arguments, root = write_experiment(tmp_path, ARMS), tmp_path / "run"
    out = finish(start("experiment", arguments), timeout=1200)
    models = [arm for arm in ARMS if arm != "direct"]
    stages = len(models) * 2 + 1 + 3  # a model and its scores, one adaptation, three of controls
    assert out.count("\n== seed_5/") == stages and "done before" not in out
    assert (
        out.count(f"--gin.EXTENSIONS={tmp_path}/own.py") == len(models) == out.count("moe_jax.eval")
    )
    assert f"({stages} of {stages}, " in out and "Few-shot scores on unseen tasks" in out
    results = files.read_json(root / "results.json")
    assert list(results["arms"]) == list(ARMS) and results["seeds"] == [5]
    assert {row["arm"] for row in results["scores"]["few_shot"]} == set(ARMS)
    assert {row["arm"] for row in results["scores"]["zero_shot"]} == set(models)
    assert {row["task"] for row in results["scores"]["training_tasks"]} == {"toy_copy", "toy_sum"}
    assert files.read_json(root / "report/report.json")["model"] == "mixture of experts"
    # The ontology's two categories are the oracle's experts, in both layers.
    routes = files.read_json(root / "seed_5/oracle/routes.json")["tasks"]
    assert (
        routes["toy_copy"]["route"] == [[0, 1]] * 2 and routes["toy_sum"]["route"] == [[1, 0]] * 2
    )

    again = finish(start("experiment", arguments), timeout=300)
    assert again.count("done before") == stages
    assert files.read_json(root / "results.json") == results
    changed = [*arguments, "--gin.experiment.eval_examples=3"]
    assert finish(start("experiment", changed), timeout=600).count("done before") == stages - 5
