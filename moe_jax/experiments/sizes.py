"""How large models are and what their training costs, to make a dense one of the same size."""

import dataclasses
import math
from collections.abc import Sequence

import jax

from moe_jax.core.errors import UserError
from moe_jax.core.sharding import MeshConfig, make_mesh
from moe_jax.model.task_moe import TaskMoE, shapes_of
from moe_jax.planning.flops import flops
from moe_jax.planning.step_plan import BatchShape, abstract_arguments
from moe_jax.runs.config import Config
from moe_jax.runs.load import build_model
from moe_jax.training.step import make_train_step

_MULTIPLE = 8  # of the width that is found


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of models on a mixture of `tasks` tasks, whose vocabulary has `vocabulary` ids."""

    vocabulary: int
    tasks: int

    def parameters(self, config: Config) -> int:
        """The number of all parameters: backbone, router and representations."""
        return sum(math.prod(shape) for shape in shapes_of(self._model(config)).values())

    def step_flops(self, config: Config) -> float:
        """Operations of all matrix products in one training step, the router's included."""
        data = config.data
        mesh = make_mesh(MeshConfig(), jax.local_devices()[:1])
        shape = BatchShape(data.groups, data.rows_per_group, **data.lengths)
        model = self._model(config)
        arguments = abstract_arguments(model, config.optimizer, mesh, shape)
        with jax.set_mesh(mesh):
            step = make_train_step(model, config.optimizer, config.step, mesh, 1000, 0)
            return flops(step, *arguments)

    def steps_of_equal_compute(
        self, dense: Config, dense_steps: int, others: Sequence[Config]
    ) -> int:
        """The steps of `dense` that cost as much as `dense_steps` of it and all of `others`."""
        total = sum(c.run.train_steps * self.step_flops(c) for c in others)
        return dense_steps + round(total / self.step_flops(dense))

    def width_of_equal_parameters(self, dense: Config, other: Config) -> int:
        """The `ModelConfig.d_ff` with which `dense` has as many parameters as `other`, to the
        nearest multiple of 8.

        Raises:
            UserError: `other` has fewer parameters than the narrowest such model.
        """

        def parameters(width: int) -> int:
            model = dataclasses.replace(dense.model, d_ff=width)
            return self.parameters(dataclasses.replace(dense, model=model))

        least = parameters(_MULTIPLE)
        each = parameters(2 * _MULTIPLE) - least  # of `_MULTIPLE` more hidden units
        wanted = self.parameters(other)
        if wanted < least:
            raise UserError(
                f"no dense model has as few parameters as the mixture: {wanted:,}, at least"
                f" {least:,}"
            )
        return _MULTIPLE * (1 + round((wanted - least) / each))

    def _model(self, config: Config) -> TaskMoE:
        return build_model(config.model, config.router, self.vocabulary, self.tasks)
