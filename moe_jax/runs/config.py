"""The configuration of a run: a tree of dataclasses, made once by each command and passed down."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

from moe_jax.core.errors import UserError, check_fields
from moe_jax.core.sharding import MeshConfig
from moe_jax.data.modules import DEFAULT_TASK_MODULES, full_name
from moe_jax.data.vocabulary import VocabularyConfig
from moe_jax.decoding.search import DecodingConfig
from moe_jax.model.config import ModelConfig, RouterConfig
from moe_jax.training.optimizer import OptimizerConfig
from moe_jax.training.step import StepConfig

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
RunConfig.checkpoint_period = %CHECKPOINT_PERIOD
RunConfig.initial_checkpoint_path = %INITIAL_CHECKPOINT_PATH
RunConfig.router_checkpoint_path = %ROUTER_CHECKPOINT_PATH
RunConfig.extensions = %EXTENSIONS
RunConfig.seed = %SEED
FinetuneConfig.dense_dir = %DENSE_DIR
FinetuneConfig.moe_dir = %MOE_DIR
"""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The training data: tasks, vocabulary, shape of batches, mixing rates.

    Attributes:
        mixture_or_task_name: name registered with SeqIO.
        task_modules: modules that register tasks: dotted names or .py files.
        lengths: {'inputs': N, 'targets': N}, tokens in a row.
        cache_dir: where prepared data lives.
        vocabulary: the vocabulary that tokenises texts.
        environment: environment variables that the task modules read (see
            `tasks/crossfit_data.py`).
        batch_size: rows per batch.
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

    mixture_or_task_name: str | None = None
    task_modules: Sequence[str] = ()
    lengths: Mapping[str, int] = dataclasses.field(default_factory=dict)
    cache_dir: str = "cache"
    vocabulary: VocabularyConfig = dataclasses.field(default_factory=VocabularyConfig)
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    batch_size: int = 32
    rows_per_group: int = 4
    pack: bool = True
    row_shapes: int = 1
    mixing: Literal["examples", "equal", "temperature", "seqio"] = "examples"
    cap: int | None = None
    mixing_temperature: float = 1.0

    def __post_init__(self) -> None:
        lengths = self.lengths
        if (
            not isinstance(lengths, Mapping)
            or set(lengths) != {"inputs", "targets"}
            or not all(isinstance(n, int) and n > 1 for n in lengths.values())
        ):
            raise UserError(
                "TASK_FEATURE_LENGTHS must be {'inputs': N, 'targets': N}, lengths of at least 2, "
                f"not {lengths!r}"
            )
        check_fields(self)
        names = self.task_modules
        names = (names,) if isinstance(names, str) else names
        object.__setattr__(self, "task_modules", tuple(map(full_name, names)))
        for name in ("batch_size", "rows_per_group", "row_shapes"):
            if getattr(self, name) < 1:
                raise UserError(f"DataConfig.{name} must be at least 1, not {getattr(self, name)}")
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


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A run's directory, length, periods and starting points.

    Attributes:
        model_dir: the run's directory.
        train_steps: optimizer steps in all.
        eval_period: steps between evaluations on the dev split; 0 for none.
        checkpoint_period: steps between checkpoints; the last step is always saved.
        log_period: steps between lines of metrics.jsonl.
        initial_checkpoint_path: model directory (or checkpoint) whose backbone this run starts
            from. A dense one is copied to every expert, plus `ModelConfig.expert_noise`.
        router_checkpoint_path: the same for router and task representations, which are matched by
            task name.
        representations_path: file of task representations to start from (`representations.py`);
            takes precedence over `router_checkpoint_path`.
        eval_split: the split evaluated while training.
        eval_examples: number of examples per task in these evaluations, evenly spaced.
        eval_batch_rows: examples decoded together.
        keep_checkpoints: number of latest checkpoints to keep; the best by mean dev score is also
            kept.
        extensions: modules or .py files that register routers, selections, families or metrics.
            They are imported before the configuration is made, and must not import TensorFlow.
        seed: of initialisation, dropout, routes and data order.
    """

    model_dir: str | None = None
    train_steps: int | None = None
    eval_period: int = 1000
    checkpoint_period: int = 1000
    log_period: int = 10
    initial_checkpoint_path: str | None = None
    router_checkpoint_path: str | None = None
    representations_path: str | None = None
    eval_split: str = "validation"
    eval_examples: int | None = 32
    eval_batch_rows: int = 32
    keep_checkpoints: int = 1
    extensions: Sequence[str] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("train_steps", "checkpoint_period", "log_period", "eval_batch_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"RunConfig.{name} must be at least 1, not {value}")

    def require(self, *names: str) -> None:
        """Raises a UserError for the first of these settings that is missing."""
        for name in names:
            if getattr(self, name) is None:
                macro = {"model_dir": "MODEL_DIR", "train_steps": "TRAIN_STEPS"}[name]
                raise UserError(f"{macro} is not set: give --gin.{macro}=...")


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """Few-shot adaptation: starting points, grid and trained parts.

    Attributes:
        dense_dir: model directory of the dense multi-task model. The start `untrained` is that
            model before its first step (so, its INITIAL_CHECKPOINT_PATH, if it had one).
        moe_dir: model directory of the mixture of experts.
        learning_rates: learning rates to search on dev: the backbone's, or the representation's if
            the backbone is not trained.
        batch_sizes: batch sizes to search on dev.
        seeds: few-shot samples, each with splits `fewshot_SEED_train` and
            `fewshot_SEED_validation`.
        steps: optimizer steps of every run.
        test_examples: at most this many test examples.
        representation: of a new task in the mixture of experts: the `mean` of the training
            tasks', that of the `nearest` one (whose route has the lowest loss on the few
            examples), `random` (standard normal, as before training), or that of a `file`.
        representations_path: the file (see `data.representations`).
        tune: the trained parts of the mixture of experts: `all`; with a `frozen_router`, its
            experts and the task's representation; `route_only`, that representation alone;
            `free_route`, the route logits [N, E] instead. All parameters of the dense starts are
            trained.
        runs_at_once: runs that train side by side on every device, in one call; 0 takes as many as
            their memory allows, and on CPU, where one follows the other, a handful.
    """

    dense_dir: str | None = None
    moe_dir: str | None = None
    learning_rates: Sequence[float] = (1e-5, 2e-5, 5e-5)
    batch_sizes: Sequence[int] = (2, 4, 8)
    seeds: Sequence[int] = (13, 21, 42, 87, 100)
    steps: int = 1000
    test_examples: int | None = None
    representation: Literal["mean", "nearest", "random", "file"] = "nearest"
    representations_path: str | None = None
    tune: Literal["all", "frozen_router", "route_only", "free_route"] = "all"
    runs_at_once: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        if self.runs_at_once < 0:
            raise UserError(f"FinetuneConfig.runs_at_once is {self.runs_at_once}, below 0")
        if (self.representation == "file") != (self.representations_path is not None):
            raise UserError(
                f"FinetuneConfig.representation is {self.representation!r} and representations_path"
                f" {self.representations_path!r}: 'file' and a path go together"
            )


@dataclasses.dataclass(frozen=True)
class Config:
    """The configuration of a training run, saved with it."""

    run: RunConfig
    data: DataConfig
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    router: RouterConfig = dataclasses.field(default_factory=RouterConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    step: StepConfig = dataclasses.field(default_factory=StepConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    decoding: DecodingConfig = dataclasses.field(default_factory=DecodingConfig)


@dataclasses.dataclass(frozen=True)
class FewShotConfig:
    """The configuration of a few-shot adaptation, saved with it."""

    run: RunConfig
    data: DataConfig
    finetune: FinetuneConfig = dataclasses.field(default_factory=FinetuneConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    step: StepConfig = dataclasses.field(default_factory=StepConfig)
    decoding: DecodingConfig = dataclasses.field(default_factory=DecodingConfig)
