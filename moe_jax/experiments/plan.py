"""What an experiment consists of: the stages of every seed and arm, made from its settings."""

import dataclasses
import functools
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_jax import __version__
from moe_jax.core import files, processes
from moe_jax.core.configuration import Configuration
from moe_jax.core.errors import UserError
from moe_jax.data import modules
from moe_jax.data.cache import PreparedMixture
from moe_jax.experiments import controls
from moe_jax.experiments.arms import (
    ARMS,
    COMPUTE,
    DENSE,
    DESCRIBED,
    DIRECT,
    ORACLE,
    PARAMETERS,
    ROUTED,
    with_needed,
)
from moe_jax.experiments.config import ExperimentConfig
from moe_jax.experiments.sizes import Sizes
from moe_jax.experiments.stages import Stage
from moe_jax.runs import directory, flags
from moe_jax.runs.config import Config, FewShotConfig
from moe_jax.runs.mixtures import prepare_mixtures

SPLIT = "test"
PRETRAINED = "pretrained"  # the directory of the model that all start from
# Settings on which no outcome depends.
_FREE = (
    "RunConfig.model_dir",
    "DataConfig.cache_dir",
    "MeshConfig.",
    "FinetuneConfig.runs_at_once",
)
Bindings = dict[str, str]


class Plan:
    """The stages of an experiment.

    Making it prepares the data.

    Attributes:
        arms: in the order of the tables.
        mixtures: of the training tasks, and of the unseen ones.
    """

    def __init__(self, root: Path, settings: ExperimentConfig):
        self.root, self.settings = root, settings
        self.arms = with_needed(settings.arms)
        if len(set(settings.seeds)) < len(settings.seeds):
            raise UserError(f"experiment.seeds {tuple(settings.seeds)} has one twice")
        given = dict(flags.given_bindings())
        if "SEED" in given:
            raise UserError("SEED is one of experiment.seeds: give --gin.experiment.seeds='(N,)'")
        self._given = {k: v for k, v in given.items() if not k.startswith("experiment.")}
        data = self._config(settings.dense, {}).data
        prepared = prepare_mixtures(data, settings.unseen)
        trained, self.unseen = prepared[data.mixture_or_task_name], prepared[settings.unseen]
        if both := sorted({*trained.names} & {*self.unseen.names}):
            raise UserError(
                f"experiment.unseen {settings.unseen!r} has tasks of {trained.name!r}, which are"
                f" trained on: {', '.join(both)}"
            )
        self.trained = trained
        self._data = {m.name: m.fingerprint for m in (trained, self.unseen)}
        self._text = self._texts() if settings.pretrain else None
        self._sizes = Sizes(trained.vocabulary.size, len(trained.tasks))
        self._planted = None
        if DESCRIBED in self.arms and not settings.described:
            raise UserError(f"the arm {DESCRIBED!r} needs experiment.described, a setting's name")
        if ORACLE in self.arms:
            self._planted = controls.planted_experts(trained, self.unseen, settings.oracle)

    def stages(self, seed: int) -> list[Stage]:
        """The stages of a seed, parents before children."""
        models = [arm for arm in self.arms if arm != DIRECT]
        stages = [stage for arm in models for stage in self._model(seed, arm)]
        if self._text is not None and seed == self.settings.seeds[0]:
            stages.insert(0, self._pretrained(seed))
        stages += [self._scores(seed, arm) for arm in models]
        return stages + [self._adaptation(seed, *item) for item in self.few_shot(seed).items()]

    def place(self, seed: int, name: str) -> Path:
        """The directory of a seed's arm, or of its `few_shot`."""
        return self.root / f"seed_{seed}" / name

    def few_shot(self, seed: int) -> dict[Path, dict[str, str]]:
        """The directories of a seed's adaptation, and which arm each start in them is."""
        common = {"untrained": DIRECT, "dense": DENSE, "moe": ROUTED}
        common = {start: arm for start, arm in common.items() if arm in self.arms}
        result = {self.place(seed, "few_shot"): common}
        for arm in self.arms:
            if arm not in common.values():
                start = "dense" if ARMS[arm].dense else "moe"
                result[self.place(seed, arm) / "few_shot"] = {start: arm}
        return result

    # ---------------------------------------------------------------- the stages of a seed

    def _texts(self) -> PreparedMixture:
        """What the pre-training reads.

        Raises:
            UserError: it cannot start the other models.
        """
        file, data = self.settings.pretrain, self._config(self.settings.pretrain, {}).data
        texts = prepare_mixtures(data)[data.mixture_or_task_name]
        if texts.vocabulary_dir != self.trained.vocabulary_dir:
            raise UserError(
                f"{file} has another vocabulary than {self.settings.dense}: give both the same"
                " VocabularyConfig, with a mixture in VocabularyConfig.trained_on"
            )
        if PARAMETERS in self.arms:
            raise UserError(
                f"the arm {PARAMETERS!r} is wider than the model of {file}, from which all start"
            )
        return texts

    def _pretrained(self, seed: int) -> Stage:
        """The model that all others start from."""
        stage = self._trained(seed, PRETRAINED, self.settings.pretrain, {})
        return dataclasses.replace(stage, inputs=[*stage.inputs, self._text.fingerprint])

    def _model(self, seed: int, arm: str) -> list[Stage]:
        """The stages that make an arm's model."""
        s, name = self.settings, f"seed_{seed}/{arm}"
        if ARMS[arm].made == "derived":
            return [self._derived(seed, arm)]
        if ARMS[arm].dense:
            bindings, parents = self._start(seed, 0)
            bindings = bindings | self._dense_bindings(arm)
            return [self._trained(seed, name, s.dense, bindings, parents)]
        if not ARMS[arm].given:
            first, before = f"{name}_stage1" if s.stage2 else name, []
            bindings, parents = self._start(seed, 1)
            if s.represent:
                before = [self._represented(seed)]
                bindings["RunConfig.representations_path"] = str(self._representations(seed))
                parents = (*parents, before[0].name)
            stages = [*before, self._trained(seed, first, s.stage1, bindings, parents)]
            if s.stage2:
                bindings, parents = self._start(seed, 2)
                bindings["ROUTER_CHECKPOINT_PATH"] = str(self.root / first)
                stages.append(self._trained(seed, name, s.stage2, bindings, (*parents, first)))
            return stages
        bindings, parents = self._start(seed, 2 if s.stage2 else 1)
        file = s.stage2 or s.stage1  # known routes need no stage that finds them
        more, rows = self._given_routes(seed, arm, file)
        return [self._trained(seed, name, file, bindings | more, parents, rows)]

    def _start(self, seed: int, stage: int) -> tuple[Bindings, tuple[str, ...]]:
        """Where a stage starts (0: of a dense model), and the stages that this comes from."""
        dense, step = self.place(seed, DENSE), self.settings.upcycle_step
        if stage == 1 and step:
            start = str(dense / "checkpoints" / str(step))
        elif stage == 2 and self.settings.stage2_from_dense:
            start = str(dense)
        elif self._text is not None:
            return {"INITIAL_CHECKPOINT_PATH": str(self.root / PRETRAINED)}, (PRETRAINED,)
        else:
            return {}, ()
        return {"INITIAL_CHECKPOINT_PATH": start}, (f"seed_{seed}/{DENSE}",)

    def _representations(self, seed: int) -> Path:
        return self.place(seed, "representations") / f"{self.settings.represent}.npz"

    def _represented(self, seed: int) -> Stage:
        """Computes the representations with which stage 1 starts."""
        dense, step = self.place(seed, DENSE), self.settings.upcycle_step
        bindings = {
            "MODEL_DIR": str(dense / "checkpoints" / str(step) if step else dense),
            "represent.kind": self.settings.represent,
            "represent.output": str(self._representations(seed)),
        }
        name = f"seed_{seed}/representations"
        return self._of_run(name, "represent", f"seed_{seed}/{DENSE}", bindings)

    def _given_routes(self, seed: int, arm: str, file: str) -> tuple[Bindings, controls.Rows]:
        """What a mixture with known routes differs in, and those routes."""
        model = self._config(file, {}).model
        layers, experts = len(model.routed_layers), model.experts
        if ARMS[arm].given == "planted":
            expert_of, experts = self._planted
            rows = controls.planted_routes(expert_of, layers, experts)
        else:
            rows = controls.drawn_routes(self.trained, layers, experts, seed)
        return {
            "ModelConfig.experts": str(experts),
            "RouterConfig.kind": "free",
            "RouterConfig.representation_dim": str(layers * experts),
            "RouterConfig.selection": "argmax",
            "RouterConfig.experts_per_layer": "1",
            "RouterConfig.exploration_epsilon": "0.0",
            "RunConfig.representations_path": str(self.place(seed, arm) / controls.GIVEN),
            "OptimizerConfig.frozen": "('representations',)",
        }, rows

    @functools.cache  # noqa: B019 (a plan lives as long as the command)
    def _dense_bindings(self, arm: str) -> Bindings:
        """What another dense arm differs in from the baseline."""
        s = self.settings
        if arm == DENSE:
            return {}
        if arm == DESCRIBED:
            return {s.described: "True"}
        dense = self._config(s.dense, {})
        routed = [self._config(file, {}) for file in (s.stage1, s.stage2) if file]
        if arm == PARAMETERS:
            width = self._sizes.width_of_equal_parameters(dense, routed[-1])
            return {"ModelConfig.d_ff": str(width)}
        assert arm == COMPUTE
        before = s.upcycle_step
        if s.stage2 and s.stage2_from_dense:
            before = dense.run.train_steps
        return {"TRAIN_STEPS": str(self._sizes.steps_of_equal_compute(dense, before, routed))}

    def _trained(
        self,
        seed: int,
        name: str,
        file: str,
        bindings: Bindings,
        parents: tuple[str, ...] = (),
        rows: controls.Rows | None = None,
    ) -> Stage:
        """Training by a gin file, with given routes if there are any."""
        bindings = {"MODEL_DIR": str(self.root / name), "SEED": str(seed), **bindings}
        config = self._config(file, bindings)

        def run() -> None:
            if rows is not None:
                files.write_json(self.root / name / controls.GIVEN, rows)
            self._call("train", file, bindings)

        return Stage(
            name, "train", [self._inputs(config), rows], parents, run,
            _shown("train", self._arguments(file, bindings)), config.run.train_steps,
        )  # fmt: skip

    def _derived(self, seed: int, arm: str) -> Stage:
        source, out = self.place(seed, ROUTED), self.place(seed, arm)

        def run() -> None:
            if ARMS[arm].dense:
                controls.write_average(source, out)
            else:
                controls.write_shuffled(source, out, self.unseen, seed)

        parents = (f"seed_{seed}/{ROUTED}",)
        return Stage(f"seed_{seed}/{arm}", "derive", [arm, seed], parents, run, ARMS[arm].what)

    def _scores(self, seed: int, arm: str) -> Stage:
        s, place = self.settings, self.place(seed, arm)
        bindings = {"MODEL_DIR": str(place), "eval.mixtures": repr((s.unseen,))}
        if s.eval_examples is not None:
            bindings["eval.examples"] = str(s.eval_examples)
        if arm == ROUTED and s.disable_examples:
            bindings["eval.disable_examples"] = str(s.disable_examples)
        if ARMS[arm].route_of_new:
            bindings["eval.representations"] = str(place / controls.GIVEN)
        elif not ARMS[arm].dense:
            bindings["eval.unseen"] = s.zero_shot
        return self._of_run(f"seed_{seed}/{arm}/eval", "eval", f"seed_{seed}/{arm}", bindings)

    def _of_run(self, name: str, module: str, parent: str, bindings: Bindings) -> Stage:
        """A command that reads the configuration of its parent, a run."""
        inputs = [self._data, {k: self._inside(v) for k, v in bindings.items()}]
        bindings = bindings | self._modules
        return Stage(
            name, module, inputs, (parent,), lambda: self._call(module, None, bindings),
            _shown(module, self._arguments(None, bindings)),
        )  # fmt: skip

    @functools.cached_property
    def _modules(self) -> Bindings:
        """The user's modules, for commands without a gin file: a run's files import none."""
        named: dict[str, dict[str, None]] = {}
        for file in filter(None, (self.settings.dense, self.settings.stage1, self.settings.stage2)):
            lines = directory.config_lines(self._config(file, {}))
            for setting, names in directory.modules_in(lines).items():
                named.setdefault(setting, {}).update(dict.fromkeys(names))
        own = {k: tuple(v) for k, v in named.items() if not all(map(modules.is_shipped, v))}
        return {k: v[0] if len(v) == 1 else repr(v) for k, v in own.items()}

    def _adaptation(self, seed: int, place: Path, starts: Mapping[str, str]) -> Stage:
        s = self.settings
        bindings = {"MODEL_DIR": str(place), "SEED": str(seed)}
        if len(starts) == 1:
            bindings["FinetuneConfig.starts"] = repr(tuple(starts))
        models = {**starts, "untrained": DENSE}  # direct fine-tuning begins as the dense model did
        parents = tuple(dict.fromkeys(f"seed_{seed}/{models[start]}" for start in starts))
        for start in starts:
            key = "MOE_DIR" if start == "moe" else "DENSE_DIR"
            bindings[key] = str(self.place(seed, models[start]))
        for arm in starts.values():
            if arm == DESCRIBED:
                bindings[s.described] = "True"
            if ARMS[arm].route_of_new:
                bindings["FinetuneConfig.representation"] = "file"
                path = str(self.place(seed, arm) / controls.GIVEN)
                bindings["FinetuneConfig.representations_path"] = path
            if ARMS[arm].given == "planted":  # the ontology's route is not adapted
                bindings["OptimizerConfig.frozen"] = "('representations',)"
        config = self._config(s.finetune, bindings, FewShotConfig)
        return Stage(
            str(place.relative_to(self.root)), "finetune", self._inputs(config), parents,
            lambda: self._call("finetune", s.finetune, bindings),
            _shown("finetune", self._arguments(s.finetune, bindings)), len(starts),
        )  # fmt: skip

    # ---------------------------------------------------------------- commands

    def _arguments(self, file: str | None, bindings: Bindings) -> list[str]:
        """A command's flags. Without a file, it reads a run's own configuration."""
        named = [] if file is None else [self.settings.model, file]
        bindings = bindings if file is None else self._given | bindings
        return [
            *(f"--gin_file={name}" for name in named),
            *(f"--gin.{key}={value}" for key, value in bindings.items()),
        ]

    def _call(self, module: str, file: str | None, bindings: Bindings) -> None:
        """Runs a command of this package.

        Raises:
            UserError: it failed; its output is above the message.
        """
        arguments = [*flags.process_flags(), *self._arguments(file, bindings)]
        code = processes.call([sys.executable, "-m", f"moe_jax.{module}", *arguments])
        if code:
            raise UserError(f"moe_jax.{module} {processes.ending(code)}")

    def _config(self, file: str, bindings: Bindings, cls: type = Config) -> Any:
        return flags.stage_config(cls, [self.settings.model, file], self._given | bindings)

    def _inputs(self, config: Configuration) -> list[Any]:
        """All that decides what a command makes of its configuration and its parents."""
        lines = directory.config_lines(config).items()
        lines = {k: self._inside(v) for k, v in lines if not k.startswith(_FREE)}
        return [__version__, self._data, lines]

    def _inside(self, value: Any) -> Any:
        """A path in the experiment's own directory without it: the experiment may be moved."""
        if isinstance(value, str) and value.startswith(f"{self.root}/"):
            return value.removeprefix(f"{self.root}/")
        return value


def _shown(module: str, arguments: Sequence[str]) -> str:
    return f"$ python -m moe_jax.{module} {shlex.join(arguments)}"
