"""The stages of an experiment, without running them."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from absl import flags as absl_flags

from moe_jax import experiment
from moe_jax.core import files
from moe_jax.core.errors import UserError
from moe_jax.data.cache import PreparedTask
from moe_jax.experiments import plan as plan_module
from moe_jax.experiments.arms import ARMS, with_needed
from moe_jax.experiments.config import ExperimentConfig
from moe_jax.experiments.controls import GIVEN
from moe_jax.experiments.plan import Plan
from moe_jax.experiments.stages import fingerprints
from moe_jax.runs import gin_files
from moe_jax.runs.config import RunConfig

QUICKSTART = {
    "model": "models/tiny.gin", "dense": "runs/skills_gym_dense.gin",
    "stage1": "runs/skills_gym_stage1.gin", "finetune": "runs/skills_gym_finetune.gin",
    "unseen": "skills_gym_unseen", "upcycle_step": 2000,
}  # fmt: skip


def mixture(name, tasks):
    """A prepared mixture as far as a plan looks at it."""
    tasks = tuple(
        PreparedTask(task, category, skill, "", None, 1.0, {}, (), (), None, "")
        for task, category, skill in tasks
    )
    names = tuple(task.name for task in tasks)
    vocabulary = SimpleNamespace(size=1024)
    return SimpleNamespace(
        name=name, tasks=tasks, names=names, fingerprint="f", vocabulary=vocabulary,
        vocabulary_dir=Path("v"),
    )  # fmt: skip


TRAINED = [("t1", "extract", "place"), ("t2", "know", "capital"), ("t3", "know", "language")]
NEW = [("n1", "know", "capital"), ("n2", "combine", "place+capital"), ("n3", "none", "none")]


@pytest.fixture(autouse=True)
def prepared(monkeypatch):
    """The mixtures; no task is registered or tokenised."""
    found = {"skills_gym_train": mixture("skills_gym_train", TRAINED)}
    found["skills_gym_unseen"] = mixture("skills_gym_unseen", NEW)

    def prepare(data, *names):
        return {name: found[name] for name in (data.mixture_or_task_name, *names)}

    monkeypatch.setattr(plan_module, "prepare_mixtures", prepare)
    return found


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """The commands that stages would have run."""
    called = []

    def call(command):
        called.append(command)
        return 0

    monkeypatch.setattr(plan_module.processes, "call", call)
    return called


@pytest.fixture
def command_line():
    """A function that sets the flags of this process."""

    def given(*arguments):
        absl_flags.FLAGS.unparse_flags()
        absl_flags.FLAGS["gin_bindings"].unparse()
        absl_flags.FLAGS(gin_files.rewrite_flags(["experiment", *arguments]))

    given()
    yield given
    given()


def planned(root, **settings):
    """(plan, stages of all its seeds by name)."""
    plan = Plan(root, ExperimentConfig(**{**QUICKSTART, **settings}))
    return plan, {s.name: s for seed in plan.settings.seeds for s in plan.stages(seed)}


def flags_of(stage):
    """{setting: value} of a stage's command line."""
    words = stage.shown.replace("'\"'\"'", '"').replace("'", "").split(" --gin.")[1:]
    return dict(word.split("=", 1) for word in words)


def test_stages_get_macros_but_not_the_experiments_own_settings(tmp_path, calls, command_line):
    """`train` and the others know no `experiment.eval_examples`."""
    command_line("--gin.TRAIN_STEPS=4", "--gin.experiment.eval_examples=2")
    _, stages = planned(tmp_path)
    stages["seed_0/dense"].run()
    bindings = [argument for argument in calls[0] if argument.startswith("--gin.")]
    place = tmp_path / "seed_0/dense"
    assert bindings == ["--gin.TRAIN_STEPS=4", f"--gin.MODEL_DIR={place}", "--gin.SEED=0"]


@pytest.mark.parametrize("upcycle_step", [0, 7])
@pytest.mark.parametrize("stage2", ["", "runs/skills_gym_stage2.gin"])
def test_the_mixture_may_start_from_the_dense_model_and_have_one_stage(
    tmp_path, command_line, stage2, upcycle_step
):
    _, stages = planned(tmp_path, stage2=stage2, upcycle_step=upcycle_step)
    trained = [name for name, stage in stages.items() if stage.kind == "train"]
    first = "seed_0/routed_stage1" if stage2 else "seed_0/routed"
    assert trained == ["seed_0/dense", *([first] if stage2 else []), "seed_0/routed"]
    start = f"{tmp_path}/seed_0/dense/checkpoints/7" if upcycle_step else None
    assert flags_of(stages[first]).get("INITIAL_CHECKPOINT_PATH") == start
    assert stages[first].parents == (("seed_0/dense",) if upcycle_step else ())
    if stage2:
        own = flags_of(stages["seed_0/routed"])
        assert own["ROUTER_CHECKPOINT_PATH"] == f"{tmp_path}/seed_0/routed_stage1"
        assert stages["seed_0/routed"].parents == ("seed_0/routed_stage1",)
    adapted = flags_of(stages["seed_0/few_shot"])
    assert adapted["MOE_DIR"] == f"{tmp_path}/seed_0/routed"
    assert adapted["DENSE_DIR"] == f"{tmp_path}/seed_0/dense"
    assert "FinetuneConfig.starts" not in adapted  # all three


@pytest.mark.parametrize("stage2", ["", "runs/skills_gym_stage2.gin"])
def test_the_router_may_read_what_the_dense_model_makes_of_tasks(tmp_path, command_line, stage2):
    arms = ("routed", "random")
    _, stages = planned(tmp_path, represent="text", upcycle_step=7, stage2=stage2, arms=arms)
    made = stages["seed_0/representations"]
    assert made.parents == ("seed_0/dense",)
    file = f"{tmp_path}/seed_0/representations/text.npz"
    assert flags_of(made) == {
        "MODEL_DIR": f"{tmp_path}/seed_0/dense/checkpoints/7", "represent.kind": "text",
        "represent.output": file,
    }  # fmt: skip
    first = stages["seed_0/routed_stage1" if stage2 else "seed_0/routed"]
    assert first.parents == ("seed_0/dense", "seed_0/representations")
    assert flags_of(first)["RunConfig.representations_path"] == file
    assert "seed_0/representations" not in stages["seed_0/random"].parents


def test_commands_on_a_run_are_given_the_users_modules(tmp_path, command_line):
    """Of the command line and of all gin files: a run's files import none."""
    (tmp_path / "one.py").write_text("")
    (tmp_path / "two.py").write_text("")
    for name, file in (("dense", "one.py"), ("stage1", "two.py")):
        text = Path(gin_files.GIN_CONFIGS, QUICKSTART[name]).read_text()
        text += f"\nEXTENSIONS = ({str(tmp_path / file)!r},)\n"
        (tmp_path / f"{name}.gin").write_text(text)
    command_line(f"--gin.TASK_MODULES={tmp_path}/tasks.py")
    files = {"dense": f"{tmp_path}/dense.gin", "stage1": f"{tmp_path}/stage1.gin"}
    _, stages = planned(tmp_path, represent="text", **files)
    for name in ("representations", "dense/eval", "routed/eval"):
        given = flags_of(stages[f"seed_0/{name}"])
        assert given["TASK_MODULES"] == f"{tmp_path}/tasks.py"
        assert given["EXTENSIONS"] == f'("{tmp_path}/one.py", "{tmp_path}/two.py")'
    command_line()
    _, stages = planned(tmp_path)  # nothing but what is shipped
    assert not {"TASK_MODULES", "EXTENSIONS"} & flags_of(stages["seed_0/dense/eval"]).keys()


def test_all_arms(tmp_path, command_line, calls):
    with pytest.raises(UserError, match=r"'dense_described' needs experiment\.described"):
        planned(tmp_path, arms=tuple(ARMS))
    told, wanted = "skills_gym.descriptions", "description"
    _, stages = planned(
        tmp_path, arms=tuple(ARMS), seeds=(3, 4), described=told, zero_shot=wanted
    )  # fmt: skip
    names = [name for name in stages if name.startswith("seed_3/")]
    models = [arm for arm in ARMS if arm != "direct"]
    assert names == [
        *(f"seed_3/{arm}" for arm in models),
        *(f"seed_3/{arm}/eval" for arm in models),
        "seed_3/few_shot",
        *(f"seed_3/{arm}/few_shot" for arm in models if arm not in ("dense", "routed")),
    ]
    assert len(stages) == 2 * len(names)
    for name in names:
        assert all(parent in names for parent in stages[name].parents)
    # Known routes: one expert of 4 in each of 4 layers, the same file for all that need it.
    oracle = flags_of(stages["seed_3/oracle"])
    file = f"{tmp_path}/seed_3/oracle/{GIVEN}"
    assert oracle["RunConfig.representations_path"] == file
    assert oracle["ModelConfig.experts"] == "2"  # two categories
    assert oracle["RouterConfig.representation_dim"] == "8"
    assert flags_of(stages["seed_3/oracle/eval"])["eval.representations"] == file
    adapted = flags_of(stages["seed_3/oracle/few_shot"])
    assert adapted["FinetuneConfig.representations_path"] == file
    assert adapted["FinetuneConfig.starts"] == '("moe",)'
    stages["seed_3/oracle"].run()
    extract, know = [1.0, 0.0] * 4, [0.0, 1.0] * 4
    # n2 needs two skills and takes the last; n3's skill is in no training task.
    rows = {"t1": extract, "t2": know, "t3": know, "n1": know, "n2": know, "n3": extract}
    assert files.read_json(file) == rows
    # Random routes are drawn for each seed; a new task's is found as in the routed model.
    rows = []
    for seed in (3, 4):
        stages[f"seed_{seed}/random"].run()
        rows.append(files.read_json(tmp_path / f"seed_{seed}/random" / GIVEN))
    assert rows[0] != rows[1] and set(rows[0]) == {"t1", "t2", "t3"}
    assert "eval.representations" not in flags_of(stages["seed_3/random/eval"])
    # Arms whose router finds routes, and no other, find those of new tasks as told.
    for arm in models:
        found = flags_of(stages[f"seed_3/{arm}/eval"]).get("eval.unseen")
        assert found == (wanted if arm in ("routed", "random") else None)
    for name in names:
        dense = name in ("seed_3/dense_described", "seed_3/dense_described/few_shot")
        assert flags_of(stages[name]).get(told) == ("True" if dense else None)
    assert stages["seed_3/average/few_shot"].parents == ("seed_3/average",)
    assert flags_of(stages["seed_3/average/few_shot"])["FinetuneConfig.starts"] == '("dense",)'
    assert [flags_of(stages[f"seed_{s}/dense"])["SEED"] for s in (3, 4)] == ["3", "4"]


@pytest.mark.parametrize("upcycle_step", [0, 7])
def test_all_models_may_start_from_one_that_read_text(
    tmp_path, command_line, prepared, upcycle_step
):
    text = prepared["pretraining_infilling"] = mixture("pretraining_infilling", [("p", "", "")])
    settings = {"pretrain": "runs/pretrain.gin", "seeds": (3, 4), "upcycle_step": upcycle_step}
    arms = ("routed", "random")

    def stages():
        return planned(tmp_path, **settings, arms=arms)[1]

    first = next(iter(stages()))
    assert first == "pretrained" and [*stages()].count(first) == 1
    place = str(tmp_path / "pretrained")
    assert flags_of(stages()[first]) == {"MODEL_DIR": place, "SEED": "3"}
    for name, stage in stages().items():
        start, seed = flags_of(stage).get("INITIAL_CHECKPOINT_PATH"), name.split("/")[0]
        if stage.kind != "train" or name == first:
            assert start is None
        elif upcycle_step and name.endswith(("routed", "random")):
            assert start == f"{tmp_path}/{seed}/dense/checkpoints/7"
        else:
            assert start == place and stage.parents == (first,)
    before = fingerprints(list(stages().values()))
    text.fingerprint = "other"  # all is made from it
    after = fingerprints(list(stages().values()))
    assert all(before[name] != after[name] for name in before)
    with pytest.raises(UserError, match="'dense_parameters' is wider than the model of runs/pre"):
        planned(tmp_path, **settings, arms=("dense_parameters",))
    text.vocabulary_dir = Path("w")
    with pytest.raises(UserError, match=r"runs/pretrain\.gin has another vocabulary than runs/sk"):
        stages()


def test_what_arms_need_is_added():
    assert with_needed(["direct"]) == ("direct", "dense")
    assert with_needed(["shuffled"]) == ("direct", "dense", "routed", "shuffled")
    assert with_needed(reversed(ARMS)) == tuple(ARMS)


def test_fingerprints_follow_settings_data_and_parents(tmp_path, command_line, prepared):
    def changed(root=tmp_path, **settings):
        """The stages whose fingerprint differs from that of the plain experiment."""
        _, stages = planned(root, **settings)
        found = fingerprints(list(stages.values()))
        return {name for name, value in found.items() if value != before[name]}

    _, stages = planned(tmp_path)
    before = fingerprints(list(stages.values()))
    assert changed() == changed(root=tmp_path / "moved") == set()
    assert changed(eval_examples=3) == {"seed_0/dense/eval", "seed_0/routed/eval"}
    later = set(before) - {"seed_0/dense", "seed_0/dense/eval"}
    assert changed(upcycle_step=1000) == later
    # A comment decides nothing, a setting does.
    own = tmp_path / "own.gin"
    own.write_text("# Mine.\ninclude 'runs/skills_gym_finetune.gin'\n")
    assert changed(finetune=str(own)) == set()
    own.write_text("include 'runs/skills_gym_finetune.gin'\nFinetuneConfig.steps = 15\n")
    assert changed(finetune=str(own)) == {"seed_0/few_shot"}
    own.write_text("include 'runs/skills_gym_dense.gin'\nBATCH_SIZE = 8\n")
    assert changed(dense=str(own)) == set(before)
    command_line("--gin.CACHE_DIR=elsewhere", "--gin.MeshConfig.data=1")
    assert changed() == set()
    command_line("--gin.OptimizerConfig.learning_rate=0.1")
    assert changed() == set(before)
    command_line()
    prepared["skills_gym_unseen"].fingerprint = "other"
    assert changed() == set(before)


def test_what_cannot_be_is_refused(tmp_path, command_line, prepared):
    with pytest.raises(UserError, match=r"experiment\.seeds \(1, 1\) has one twice"):
        planned(tmp_path, seeds=(1, 1))
    with pytest.raises(
        UserError, match=r"experiment\.arms is .* each one of direct, dense, routed"
    ):
        planned(tmp_path, arms=("routde",))
    for name, tasks in (("skills_gym_train", "t1, t2, t3"), ("some_old", "t2")):
        prepared["some_old"] = mixture("some_old", [*NEW, TRAINED[1]])
        with pytest.raises(UserError, match=rf"'{name}' has tasks of .* trained on: {tasks}"):
            planned(tmp_path, unseen=name)
    prepared["skills_gym_train"] = mixture("skills_gym_train", [*TRAINED, ("t4", "", "")])
    with pytest.raises(UserError, match="'oracle' needs every task's category: 't4' has none"):
        planned(tmp_path, arms=("oracle",))
    with pytest.raises(UserError, match=r"experiment\.dense is not set"):
        experiment.experiment(RunConfig(model_dir=str(tmp_path)), ExperimentConfig(model="m"))
    command_line("--gin.SEED=1")
    with pytest.raises(UserError, match=r"SEED .* --gin\.experiment\.seeds='\(N,\)'"):
        planned(tmp_path)


def test_a_stage_whose_command_fails_is_an_error(tmp_path, command_line, monkeypatch):
    monkeypatch.setattr(plan_module.processes, "call", lambda command: 3)
    _, stages = planned(tmp_path)
    with pytest.raises(UserError, match=r"moe_jax\.train failed with exit code 3"):
        stages["seed_0/dense"].run()
