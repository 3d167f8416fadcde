"""TaskMoE as a model of T5X, whose own `train.py`, `eval.py` and `infer.py` drive it.

T5X calls a model by a few names and asks for no base class; so nothing of T5X is imported here. The
gin files `t5x/{train,eval,infer}.gin` put the two together (see docs/t5x.md). Parameters, losses
and answers are those of `moe_jax.train`, `eval` and `infer` with the same gin files and SEED.

The temperature and all random draws depend on the training step, which T5X does not tell a model.
It is kept as a variable of the model, which T5X saves and passes on like batch statistics.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from clu import metrics as clu_metrics
from flax import core, traverse_util
from flax.linen.partitioning import AxisMetadata
from jax.sharding import Mesh

from moe_jax.core.errors import UserError
from moe_jax.core.sharding import MeshConfig, group_shards, make_mesh
from moe_jax.data.batch import Batch
from moe_jax.data.modules import give, load_module
from moe_jax.data.registry import load_task_modules, set_environment
from moe_jax.decoding.rows import RowModel, experts_per_row, traced_row_routes
from moe_jax.decoding.scoring import log_likelihoods
from moe_jax.decoding.search import DecodingIds, decode
from moe_jax.interop.t5x_data import (
    GROUP_TASK_ID,
    NAMES,
    TASK_ID,
    TaskFeatureConverter,
    get_dataset,
    register,
)
from moe_jax.interop.t5x_run import CLOCK, describe, with_empty, without_empty
from moe_jax.model.experts import Params, share
from moe_jax.model.task_moe import init_params, parameter_shardings, routes_of
from moe_jax.runs import configurables
from moe_jax.runs.config import Config, RunConfig
from moe_jax.runs.initial import initial_params
from moe_jax.runs.load import build_model
from moe_jax.runs.mixtures import prepare_mixtures
from moe_jax.training.optimizer import (
    OptimizerConfig,
    clip_scale,
    make_optimizer,
    part_labels,
    schedule,
)
from moe_jax.training.step import PRNG, loss_and_metrics

__all__ = ["TaskMoEModel", "get_dataset", "learning_rate", "model", "optimizer", "over_mesh"]

# T5X's names of logical axes; its rules know no other, and replicate what has no name.
_AXES = {"embed": "embed", "heads": "heads", "mlp": "mlp", "vocab": "vocab"}
_Metrics = dict[str, clu_metrics.Metric]

# A gin file imports this module first; what it and later files bind has precedence.
configurables.bind_defaults()


class TaskMoEModel:
    """What T5X expects of a model.

    A batch [B, L] has the features of `t5x_data.NAMES` and the task of every row. Its rows may be
    of different tasks. In training, rows of one task that follow each other (`get_dataset`) are
    computed as one group, and other rows each as a group of its own.

    Args:
        config: as `moe_jax.train` reads it. `DataConfig.mixture_or_task_name` gives the task table.
        optimizer_def: T5X's wrapper of an optimizer, see `optimizer`.
        mesh: that of T5X's partitioner, see `over_mesh`; by default that of `config`.

    Raises:
        UserError: a setting that T5X has no place for.
    """

    def __init__(self, config: Config, optimizer_def: Any, mesh: Mesh | None = None):
        _check(config)
        set_environment(config.data.environment)
        load_task_modules(config.data.task_modules)
        mixture = prepare_mixtures(config.data)[config.data.mixture_or_task_name]
        vocabulary = mixture.vocabulary
        self.config = config
        self.optimizer_def = optimizer_def
        self.tasks = list(mixture.names)
        if config.run.model_dir is not None and jax.process_index() == 0:  # T5X trains
            describe(config.run.model_dir, config, self.tasks, mixture.vocabulary_dir)
        self.input_vocabulary = self.output_vocabulary = register(mixture)
        self.ids = DecodingIds(vocabulary.decoder_start_id, vocabulary.eos_id, vocabulary.pad_id)
        self.FEATURE_CONVERTER_CLS = partial(TaskFeatureConverter, self.ids)
        self.moe = build_model(config.model, config.router, vocabulary.size, len(self.tasks))
        self.mesh = make_mesh(config.mesh) if mesh is None else mesh
        self._rows = 0

    # ---------------------------------------------------------------- before the first step

    def get_initial_variables(
        self, rng: jax.Array, input_shapes: Mapping[str, Any], input_types: Any = None
    ) -> core.FrozenDict:
        """`params` and `params_axes`, and the step 0.

        As in `moe_jax.train`: SEED decides, not `rng`, and parameters may come from checkpoints.
        """
        del rng, input_types
        self._rows = input_shapes["encoder_input_tokens"][0]
        key = jax.random.key(self.config.run.seed, impl=PRNG)
        boxed = jax.eval_shape(partial(init_params, self.moe), key)
        run = self.config.run
        if (
            run.initial_checkpoint_path or run.router_checkpoint_path or run.representations_path
        ):  # read now, not in T5X's compiled function
            with jax.ensure_compile_time_eval():
                placed = parameter_shardings(self.moe, self.mesh)
                params = initial_params(self.moe, run, self.tasks, placed)
        else:
            params = nn.meta.unbox(init_params(self.moe, key))
        return core.freeze({
            "params": without_empty(params),
            "params_axes": _axes(without_empty(boxed)),
            CLOCK: {"step": jnp.int32(0)},
            f"{CLOCK}_axes": {"step_axes": AxisMetadata(names=())},
        })  # fmt: skip

    # ---------------------------------------------------------------- training

    def loss_fn(
        self,
        params: Params,
        batch: Mapping[str, jax.Array],
        dropout_rng: jax.Array | None,
        flax_mutables: Any,
    ) -> tuple[jax.Array, tuple[_Metrics, core.FrozenDict]]:
        """The loss of `training.step`, which T5X differentiates, metrics, and the next step.

        Args:
            dropout_rng: not used: SEED and the step give all noise.
            flax_mutables: has the step.
        """
        del dropout_rng
        rows = batch["encoder_input_tokens"].shape[0]
        if rows != self._rows:
            raise UserError(
                f"T5X gives {rows} of {self._rows} rows at a time: set Trainer.num_microbatches ="
                " None; groups are computed one after the other (StepConfig.groups_at_once)"
            )
        step = flax_mutables[CLOCK]["step"]
        frozen = self.config.optimizer.frozen
        params = {
            part: jax.lax.stop_gradient(tree) if part in frozen else tree
            for part, tree in with_empty(core.unfreeze(params)).items()
        }
        loss, (found, _) = loss_and_metrics(
            {part: tree for part, tree in params.items() if part not in frozen},
            self.moe,
            params,
            self._groups(batch),
            step=step,
            key=jax.random.fold_in(jax.random.key(self.config.run.seed, impl=PRNG), step),
            config=self.config.step,
            mesh=self.mesh,
        )
        tokens = found.pop("target_tokens")
        means = {name: _average(value) for name, value in found.items()}
        means["loss"] = _average(found["loss"], tokens)
        return loss, (means, core.freeze({CLOCK: {"step": step + 1}}))

    def _groups(self, batch: Mapping[str, jax.Array]) -> Batch:
        """The rows as [G, R, L]."""
        grouped = GROUP_TASK_ID in batch
        size = self.config.data.rows_per_group if grouped else 1
        task_id_B = batch[GROUP_TASK_ID if grouped else TASK_ID][:, 0]
        groups, shards = task_id_B.shape[0] // size, group_shards(self.mesh)
        if groups % shards:
            raise UserError(
                f"a batch has {groups} groups of {size} rows: not a multiple of the mesh's {shards}"
                " data shards"
            )
        arrays = {
            name: array.reshape(groups, size, array.shape[-1])
            for name, array in _rows_of(batch).items()
        }
        return {**arrays, "task_id": task_id_B[::size]}

    # ---------------------------------------------------------------- evaluation

    def eval_fn(
        self, params: Params, batch: Mapping[str, jax.Array], flax_mutables: Any
    ) -> tuple[jax.Array, _Metrics]:
        """The mean cross-entropy of the target tokens, without noise, dropout or smoothing."""
        sums_B, tokens_B = log_likelihoods(
            self._row_model(params, batch, flax_mutables), _rows_of(batch)
        )
        tokens = jnp.sum(tokens_B).astype(jnp.float32)
        loss = -jnp.sum(sums_B) / jnp.maximum(tokens, 1.0)
        return loss, {"loss": _average(loss, tokens)}

    def predict_batch(
        self,
        params: Params,
        batch: Mapping[str, jax.Array],
        rng: jax.Array | None = None,
        flax_mutables: Any = None,
    ) -> jax.Array:
        """Decoded tokens, as `DecodingConfig` has it: int32 [B, L_out], padded after EOS.

        Args:
            rng: of sampling.
        """
        rows, count = _rows_of(batch), batch["encoder_input_tokens"].shape[0]
        number_B = jnp.arange(count)
        if rng is not None:
            number_B = jax.random.randint(rng, (count,), 0, jnp.iinfo(jnp.int32).max)
        return decode(
            self._row_model(params, batch, flax_mutables), rows, number_B,
            length=self.config.decoding.max_length or rows["targets"].shape[1],
            config=self.config.decoding, ids=self.ids,
        )  # fmt: skip

    def predict_batch_with_aux(
        self,
        params: Params,
        batch: Mapping[str, jax.Array],
        rng: jax.Array | None = None,
        flax_mutables: Any = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The same, and `scores` [B]: the log-likelihood of what was decoded."""
        tokens_BxL = self.predict_batch(params, batch, rng, flax_mutables)
        eos_BxL = (tokens_BxL == self.ids.eos).astype(jnp.int32)
        ended_BxL = jnp.cumsum(eos_BxL, 1) > eos_BxL
        moved_BxL = jnp.roll(tokens_BxL, 1, axis=1).at[:, 0].set(self.ids.start)
        positions_BxL = jnp.broadcast_to(jnp.arange(tokens_BxL.shape[1]), tokens_BxL.shape)
        answers = {
            "decoder_inputs": moved_BxL,
            "targets": tokens_BxL,
            "target_segments": jnp.where(ended_BxL, 0, 1),
            "target_positions": positions_BxL,
        }
        scores_B, _ = log_likelihoods(
            self._row_model(params, batch, flax_mutables), {**_rows_of(batch), **answers}
        )
        return tokens_BxL, {"scores": scores_B}

    def score_batch(
        self,
        params: Params,
        batch: Mapping[str, jax.Array],
        return_intermediates: bool = False,
        flax_mutables: Any = None,
    ) -> jax.Array:
        """The log-likelihood of every row's targets, summed over tokens: float32 [B]."""
        if return_intermediates:
            raise UserError("score_batch gives no intermediates of a TaskMoE")
        return log_likelihoods(self._row_model(params, batch, flax_mutables), _rows_of(batch))[0]

    def _row_model(
        self, params: Params, batch: Mapping[str, jax.Array], flax_mutables: Any
    ) -> RowModel:
        """The model with the route of every row's task."""
        params, routes = with_empty(core.unfreeze(params)), None
        if self.moe.routed:
            task_id_B = batch[TASK_ID if TASK_ID in batch else GROUP_TASK_ID][:, 0]
            routes_TxNxE = routes_of(self.moe, params, flax_mutables[CLOCK]["step"])
            routes = traced_row_routes(routes_TxNxE[task_id_B], experts_per_row(self.moe))
        return RowModel(self.moe, params["backbone"], routes)


def _check(config: Config) -> None:
    """Raises a UserError where T5X would do something else than what is asked for."""
    optimizer_config, mesh = config.optimizer, config.mesh
    if optimizer_config.lazy or optimizer_config.alternate_every:
        name = "lazy" if optimizer_config.lazy else "alternate_every"
        raise UserError(f"OptimizerConfig.{name} is for moe_jax.train: T5X updates all parameters")
    if mesh.fsdp * mesh.expert > 1:
        raise UserError(
            f"MeshConfig.fsdp is {mesh.fsdp} and expert {mesh.expert}: inside T5X its partitioner"
            " shards parameters, over `model` alone"
        )


def _axes(boxed: Params) -> dict[str, Any]:
    """T5X's `params_axes`: the names of the axes of every parameter."""

    def metadata(leaf: Any) -> AxisMetadata:
        names = leaf.names if isinstance(leaf, nn.LogicallyPartitioned) else (None,) * leaf.ndim
        return AxisMetadata(names=tuple(map(_AXES.get, names)))

    named = jax.tree.map(
        metadata, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
    )
    flat = traverse_util.flatten_dict(named)
    return traverse_util.unflatten_dict(
        {(*path[:-1], f"{path[-1]}_axes"): leaf for path, leaf in flat.items()}
    )


def _rows_of(batch: Mapping[str, jax.Array]) -> Batch:
    """The [B, L] arrays under our names."""
    return {ours: batch[theirs] for theirs, ours in NAMES.items()}


def _average(value: jax.Array, count: jax.Array | int = 1) -> clu_metrics.Average:
    """A mean over `count` things, which T5X merges over steps."""
    count = jnp.asarray(count, jnp.float32)
    return clu_metrics.Average(total=value * count, count=count)


# -------------------------------------------------------------------------- for gin files


def model(optimizer_def: Any, partitioner: Any) -> TaskMoEModel:
    """The model of gin's bindings over the mesh of T5X's partitioner: T5X's `MODEL`."""
    give(configurables.modules())
    extensions = configurables.build(RunConfig).extensions
    for name in (extensions,) if isinstance(extensions, str) else extensions:
        load_module(name)
    return TaskMoEModel(configurables.build(Config), optimizer_def, partitioner.mesh)


def over_mesh(partitioner: Any) -> Any:
    """T5X's partitioner over a mesh of `MeshConfig`, which has T5X's axes and more of size one.

    `PjitPartitioner.num_partitions` and `MeshConfig.model` mean the same; one of them is enough.

    Raises:
        UserError: they differ, or the partitioner has a mesh of another kind.
    """
    config, parts = configurables.build(MeshConfig), partitioner._num_partitions
    if not parts or partitioner._ici_mesh_shape is not None:
        raise UserError(
            "PjitPartitioner.model_parallel_submesh, ici_mesh_shape and dcn_mesh_shape are not for"
            " a TaskMoE: set PjitPartitioner.num_partitions"
        )
    if 1 not in (parts, config.model) and parts != config.model:
        raise UserError(
            f"PjitPartitioner.num_partitions is {parts}, MeshConfig.model {config.model}: set one"
            " of them"
        )
    partitioner.mesh = make_mesh(dataclasses.replace(config, model=max(parts, config.model)))
    return partitioner


def optimizer() -> optax.GradientTransformation:
    """`OptimizerConfig` as one transformation: shared gradients, clipping, AdamW, the learning
    rate of each part."""
    config = configurables.build(OptimizerConfig)
    steps = configurables.build(RunConfig).train_steps

    def clipped(grads: Params, params: Any = None) -> Params:
        del params
        if config.shared_gradient:
            grads = share(grads, config.shared_gradient)
        factor, _ = clip_scale(config, grads, jnp.int32(0))
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), grads)

    def rate(peak: float) -> optax.GradientTransformation:
        return optax.scale_by_schedule(lambda count: -peak * schedule(config, count, steps))

    return optax.chain(
        optax.stateless(clipped),
        make_optimizer(config),
        optax.multi_transform(
            {part: rate(peak) for part, peak in config.learning_rates.items()}, part_labels
        ),
    )


def learning_rate() -> Callable[[jax.Array], jax.Array]:
    """The backbone's learning rate at each step, which T5X logs. `optimizer` has its own."""
    config = configurables.build(OptimizerConfig)
    steps = configurables.build(RunConfig).train_steps
    return lambda step: config.learning_rate * schedule(config, step, steps)
