"""Short training runs from the same parameters, for few-shot adaptation and Fisher information."""

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from moe_jax.data.batch import Batch
from moe_jax.kernels import memory
from moe_jax.model.experts import Params
from moe_jax.model.task_moe import TaskMoE
from moe_jax.training.optimizer import OptimizerConfig, make_optimizer
from moe_jax.training.step import StepConfig, init_state, make_train_step, state_shardings


class Tuner:
    """Trains from given parameters, which stay unchanged. Compiles once per shape of batch."""

    def __init__(
        self,
        model: TaskMoE,
        optimizer_config: OptimizerConfig,
        step_config: StepConfig,
        mesh: Mesh,
        steps: int,
        seed: int,
    ):
        optimizer = make_optimizer(optimizer_config)
        # The step donates its state, so every training starts from a copy.
        self._init = jax.jit(
            lambda params: init_state(jax.tree.map(jnp.copy, params), optimizer),
            out_shardings=state_shardings(model, optimizer, mesh),
        )
        self._step = make_train_step(model, optimizer_config, step_config, mesh, steps, seed)

    def __call__(
        self, params: Params, batches: Iterable[Batch], learning_rates: Mapping[str, float]
    ) -> Params:
        """Parameters after one step per batch; `learning_rates` are the peak values per part."""
        state = self._init(params)
        rates = {part: jnp.float32(rate) for part, rate in learning_rates.items()}
        for batch in batches:
            state, _ = self._step(state, batch, rates)
        memory.keep_freed()
        return state.params
