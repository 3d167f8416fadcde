"""The configuration of a run: a tree of dataclasses, made once by each command and passed down."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from jax.sharding import Mesh

from moe_jax.core.configuration import (
    INT32,
    Configuration,
    Examples,
    Name,
    Names,
    PathName,
    Period,
    Range,
    Rate,
    Rows,
    Seed,
    Size,
    Steps,
    Text,
)
from moe_jax.core.errors import UserError
from moe_jax.core.sharding import MeshConfig, group_shards
from moe_jax.data.modules import DEFAULT_TASK_MODULES, full_name
from moe_jax.data.vocabulary import VocabularyConfig
from moe_jax.decoding.search import DecodingConfig
from moe_jax.model.config import ModelConfig, RouterConfig
from moe_jax.model.task_moe import TaskMoE
from moe_jax.training.optimizer import OptimizerConfig
from moe_jax.training.step import StepConfig, check_step

# Every command starts from these; gin files and flags set the macros (T5X's names).
BASE_BINDINGS = f"""
MODEL_DIR = None
MIXTURE_OR_TASK_NAME = None
TASK_MODULES = {DEFAULT_TASK_MODULES}
TASK_FEATURE_LENGTHS = {{'inputs': 512, 'targets': 64}}
CACHE_DIR = 'cache'
TRAIN_STEPS = None
BATCH_SIZE = 32
EVAL_PERIOD = 1000
EVAL_MIXTURES = ()
CHECKPOINT_PERIOD = 1000
INITIAL_CHECKPOINT_PATH = None
ROUTER_CHECKPOINT_PATH = None
DENSE_DIR = None
MOE_DIR = None
EXTENSIONS = ()
SEED = 0

DataConfig.mixture_or_task_name = %MIXTURE_OR_TASK_NAME
DataConfig.task_modules = %TASK_MODULES
DataConfig.lengths = %TASK_FEATURE_LENGTHS
DataConfig.cache_dir = %CACHE_DIR
DataConfig.batch_size = %BATCH_SIZE
RunConfig.model_dir = %MODEL_DIR
RunConfig.train_steps = %TRAIN_STEPS
RunConfig.eval_period = %EVAL_PERIOD
RunConfig.eval_mixtures = %EVAL_MIXTURES
RunConfig.checkpoint_period = %CHECKPOINT_PERIOD
RunConfig.initial_checkpoint_path = %INITIAL_CHECKPOINT_PATH
RunConfig.router_checkpoint_path = %ROUTER_CHECKPOINT_PATH
RunConfig.extensions = %EXTENSIONS
RunConfig.seed = %SEED
FinetuneConfig.dense_dir = %DENSE_DIR
FinetuneConfig.moe_dir = %MOE_DIR
"""
# Settings that name modules, or 'module:function'.
NAMES_MODULES = ("RunConfig.extensions", "DataConfig.task_modules", "VocabularyConfig.factory")


@dataclasses.dataclass(frozen=True)
class DataConfig(Configuration):
    """The training data: tasks, vocabulary, shape of batches, mixing rates.

    Attributes:
        mixture_or_task_name: name registered with SeqIO.
        task_modules: modules that register tasks: dotted names or .py files.
        lengths: {'inputs': N, 'targets': N}, tokens in a row.
        cache_dir: where prepared data lives.
        vocabulary: the vocabulary that tokenises texts.
        environment: environment variables that the task modules read (see
            `tasks/crossfit_data.py`).
        batch_size: rows per batch. With another one a run goes on with the next groups of its
            data; learning rates do not change.
        rows_per_group: R, rows of one task that form a group; divides `batch_size`.
        pack: put as many examples into a row as fit into `lengths`; otherwise one.
        row_shapes: maximum number of shapes of packed rows. Each task uses the shape with the least
            padding. The step is compiled for each shape, a batch holds tasks of one shape, and a
            shape with long targets needs up to three times the memory for logits.
        mixing: draws tasks in proportion to their `examples` (at most `cap` each), all `equal`ly,
            by `temperature` (rate ** (1 / mixing_temperature)), or by the rates of the `seqio`
            mixture.
        cap: limit of `mixing` by examples; None for no limit.
        mixing_temperature: temperature of `mixing` by temperature.
    """

    mixture_or_task_name: Name | None = None
    task_modules: Name | Names = ()
    lengths: Annotated[
        Mapping[Literal["inputs", "targets"], Annotated[int, Range(2, 2**20)]], Size(2, 2)
    ] = dataclasses.field(default_factory=dict)
    cache_dir: PathName = "cache"
    vocabulary: VocabularyConfig = dataclasses.field(default_factory=VocabularyConfig)
    environment: Annotated[Mapping[Name, Annotated[str, Text(0, 2**16)]], Size(0, 4096)] = (
        dataclasses.field(default_factory=dict)
    )
    batch_size: Rows = 32
    rows_per_group: Rows = 4
    pack: bool = True
    row_shapes: Annotated[int, Range(1, 64)] = 1
    mixing: Literal["examples", "equal", "temperature", "seqio"] = "examples"
    cap: Annotated[int, Range(1, INT32)] | None = None
    mixing_temperature: Annotated[float, Range(0.1, 1000)] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        names = self.task_modules
        names = (names,) if isinstance(names, str) else names
        # As paths from anywhere: a run that stores them is read from other directories.
        names = (os.path.abspath(n) if n.endswith(".py") else full_name(n) for n in names)
        object.__setattr__(self, "task_modules", tuple(names))
        vocabulary = self.vocabulary
        if vocabulary.kind == "sentencepiece" and not (vocabulary.path or vocabulary.trained_on):
            # Set here, so that other mixtures use the same vocabulary.
            name = self.mixture_or_task_name or ""
            trained = dataclasses.replace(vocabulary, trained_on=name)
            object.__setattr__(self, "vocabulary", trained)
        if self.row_shapes > 1 and not self.pack:
            raise UserError(
                f"DataConfig.row_shapes is {self.row_shapes}, but rows are not packed: "
                "DataConfig.pack is False"
            )
        if self.batch_size % self.rows_per_group:
            raise UserError(
                f"BATCH_SIZE {self.batch_size} is not a multiple of "
                f"DataConfig.rows_per_group {self.rows_per_group}"
            )

    @property
    def groups(self) -> int:
        """G, groups per batch over all processes."""
        return self.batch_size // self.rows_per_group

    @property
    def batching(self) -> dict[str, Any]:
        """These settings as `data.pipeline.train_batches` takes them."""
        return {
            "lengths": self.lengths, "groups": self.groups, "rows": self.rows_per_group,
            "pack": self.pack, "shapes": self.row_shapes, "mixing": self.mixing, "cap": self.cap,
            "temperature": self.mixing_temperature,
        }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class RunConfig(Configuration):
    """A run's directory, length, periods and starting points.

    Attributes:
        model_dir: the run's directory.
        train_steps: optimizer steps in all. With more of them a finished run goes on, and the
            learning rate is then that of the longer schedule.
        eval_period: steps between evaluations on the dev split; 0 for none.
        checkpoint_period: steps between checkpoints; the last step is always saved.
        log_period: steps between lines of metrics.jsonl.
        initial_checkpoint_path: model directory (or checkpoint) whose backbone this run starts
            from. A dense one is copied to every expert, plus `ModelConfig.expert_noise`.
        router_checkpoint_path: the same for router and task representations, which are matched by
            task name.
        representations_path: file of task representations to start from (`representations.py`);
            takes precedence over `router_checkpoint_path`.
        eval_mixtures: mixtures or tasks evaluated while training, and by `eval`; empty for the one
            that is trained on. While training, tasks that are not trained on take the mean
            representation.
        eval_split: the split evaluated while training.
        eval_examples: number of examples per task in these evaluations, evenly spaced.
        eval_batch_rows: examples decoded together.
        keep_checkpoints: number of latest checkpoints to keep; the best by mean dev score is also
            kept.
        extensions: modules or .py files that register routers, selections, families or metrics.
            They are imported before the configuration is made, and must not import TensorFlow.
        seed: of initialisation, dropout, routes and data order.
    """

    model_dir: PathName | None = None
    train_steps: Steps | None = None
    eval_period: Period = 1000
    checkpoint_period: Steps = 1000
    log_period: Steps = 10
    initial_checkpoint_path: PathName | None = None
    router_checkpoint_path: PathName | None = None
    representations_path: PathName | None = None
    eval_mixtures: Names = ()
    eval_split: Name = "validation"
    eval_examples: Examples = 32
    eval_batch_rows: Rows = 32
    keep_checkpoints: Annotated[int, Range(1, 10_000)] = 2
    extensions: Name | Names = ()
    seed: Seed = 0

    def require(self, *names: str) -> None:
        """Raises a UserError for the first of these settings that is missing."""
        for name in names:
            if getattr(self, name) is None:
                macro = {"model_dir": "MODEL_DIR", "train_steps": "TRAIN_STEPS"}[name]
                raise UserError(f"{macro} is not set: give --gin.{macro}=...")


@dataclasses.dataclass(frozen=True)
class FinetuneConfig(Configuration):
    """Few-shot adaptation: starting points, grid and trained parts.

    Attributes:
        dense_dir: model directory of the dense multi-task model. The start `untrained` is that
            model before its first step (so, its INITIAL_CHECKPOINT_PATH, if it had one).
        moe_dir: model directory of the mixture of experts.
        starts: which of `untrained`, `dense` and `moe` are adapted; () for those that there are.
        learning_rates: learning rates to search on dev: the backbone's, or the representation's if
            the backbone is not trained.
        batch_sizes: batch sizes to search on dev.
        seeds: few-shot samples, each with splits `fewshot_SEED_train` and
            `fewshot_SEED_validation`. They also decide the order of examples; dropout is the same
            in all runs.
        steps: optimizer steps of every run.
        eval_period: steps between scores on dev. A run counts as it was when that was highest; with
            0, as it is after its last step.
        test_examples: at most this many test examples.
        representation: of a new task in the mixture of experts: the `mean` of the training
            tasks', that of the `nearest` one (whose route has the lowest loss on the few
            examples), `random` (standard normal, as before training), or that of a `file`.
        representations_path: the file (see `data.representations`).
        tune: the trained parts of the mixture of experts: `all`; with a `frozen_router`, its
            experts and the task's representation; `route_only`, that representation alone;
            `free_route`, the route logits [N, E] instead; `merged`, all of a dense model, whose
            layers are the experts' means, weighted by the representation's route (or, if that is
            the `mean`, by the mean of the training tasks' routes). All parameters of the dense
            starts are trained.
        route_steps: steps of Adam that first fit the route of `merged` to the few examples by
            which `nearest` chooses.
        route_learning_rate: learning rate of these steps, in logits.
        runs_at_once: runs that train side by side on every device, in one call; 0 takes as many as
            their memory allows, and on CPU, where one follows the other, a handful.
    """

    dense_dir: PathName | None = None
    moe_dir: PathName | None = None
    starts: Annotated[Sequence[Literal["untrained", "dense", "moe"]], Size(0, 3)] = ()
    learning_rates: Annotated[Sequence[Rate], Size(1, 1000)] = (1e-5, 2e-5, 5e-5)
    batch_sizes: Annotated[Sequence[Rows], Size(1, 1000)] = (2, 4, 8)
    seeds: Annotated[Sequence[Seed], Size(1, 1000)] = (13, 21, 42, 87, 100)
    steps: Steps = 1000
    eval_period: Period = 0
    test_examples: Examples = None
    representation: Literal["mean", "nearest", "random", "file"] = "nearest"
    representations_path: PathName | None = None
    tune: Literal["all", "frozen_router", "route_only", "free_route", "merged"] = "all"
    route_steps: Period = 0
    route_learning_rate: Rate = 0.3
    runs_at_once: Annotated[int, Range(0, 2**20)] = 0

    @property
    def adapted(self) -> dict[str, Name]:
        """The starts and the directory of each.

        Raises:
            UserError: a start's directory is not given.
        """
        places = {"untrained": self.dense_dir, "dense": self.dense_dir, "moe": self.moe_dir}
        starts = self.starts or [s for s in places if s != "moe" or self.moe_dir is not None]
        for start in starts:
            if places[start] is None:
                name = "moe_dir" if start == "moe" else "dense_dir"
                macro = name.upper()
                raise UserError(f"FinetuneConfig.{name} is not set: give --gin.{macro}=...")
        return {start: places[start] for start in places if start in starts}

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.representation == "file") != (self.representations_path is not None):
            raise UserError(
                f"FinetuneConfig.representation is {self.representation!r} and representations_path"
                f" {self.representations_path!r}: 'file' and a path go together"
            )


@dataclasses.dataclass(frozen=True)
class Config(Configuration):
    """The configuration of a training run, saved with it."""

    run: RunConfig
    data: DataConfig
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    router: RouterConfig = dataclasses.field(default_factory=RouterConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    step: StepConfig = dataclasses.field(default_factory=StepConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    decoding: DecodingConfig = dataclasses.field(default_factory=DecodingConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        model, chosen = self.model, self.router.experts_per_layer
        if 1 < model.experts < chosen:
            raise UserError(
                f"RouterConfig.experts_per_layer is {chosen}, but ModelConfig.experts "
                f"{model.experts}"
            )
        model.check_lengths(**self.data.lengths)
        check_step(TaskMoE(model, self.router, 1), self.optimizer, self.step)
        _check_decoding(self.decoding, self.data)

    def check_groups(self, mesh: Mesh) -> None:
        """Raises a UserError where the groups of a batch do not divide over the devices."""
        data, shards, at_once = self.data, group_shards(mesh), self.step.groups_at_once
        if data.groups % shards:
            raise UserError(
                f"BATCH_SIZE {data.batch_size} is {data.groups} groups of {data.rows_per_group} "
                f"rows: not a multiple of the mesh's {shards} data shards"
            )
        groups = data.groups // shards
        if at_once and groups % min(at_once, groups):
            raise UserError(
                f"StepConfig.groups_at_once {at_once} does not divide the {groups} groups per "
                "device"
            )


@dataclasses.dataclass(frozen=True)
class FewShotConfig(Configuration):
    """The configuration of a few-shot adaptation, saved with it."""

    run: RunConfig
    data: DataConfig
    finetune: FinetuneConfig = dataclasses.field(default_factory=FinetuneConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    step: StepConfig = dataclasses.field(default_factory=StepConfig)
    decoding: DecodingConfig = dataclasses.field(default_factory=DecodingConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_decoding(self.decoding, self.data)


def _check_decoding(decoding: DecodingConfig, data: DataConfig) -> None:
    """Raises a UserError where answers cannot be as long as they must."""
    if not decoding.max_length and decoding.min_length > data.lengths["targets"]:
        raise UserError(
            f"DecodingConfig.min_length is {decoding.min_length}, above the length of targets "
            f"{data.lengths['targets']}"
        )
