"""The layers of the encoder or the decoder, routed and vanilla."""

import itertools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax

from moe_jax.model.blocks import KEPT, DecoderLayer, EncoderLayer
from moe_jax.model.config import ModelConfig
from moe_jax.model.dispatch import with_params
from moe_jax.model.experts import cast_matrices
from moe_jax.model.placement import FETCHED, Placement

# What `jax.checkpoint` keeps, by `ModelConfig.kept_activations`; fetched weights never.
POLICIES = {
    "all": jax.checkpoint_policies.save_anything_except_these_names(FETCHED),
    "products": jax.checkpoint_policies.save_only_these_names(KEPT),
    "inputs": jax.checkpoint_policies.nothing_saveable,
}


def layer_runs(config: ModelConfig, side: str) -> list[tuple[str, slice]]:
    """Runs of consecutive layers of one kind, in order: ("routed" or "vanilla", slice of the layers
    of that kind)."""
    depth = getattr(config, f"{side}_layers")
    vanilla = getattr(config, f"{side}_vanilla_layers")
    result, done = [], {"routed": 0, "vanilla": 0}
    kinds = ["vanilla" if i in vanilla else "routed" for i in range(depth)]
    for kind, run in itertools.groupby(kinds):
        start = done[kind]
        done[kind] += len(list(run))
        result.append((kind, slice(start, done[kind])))
    return result


class RoutedStack(nn.Module):
    """All layers of one side. Parameters are `{"routed", "vanilla"}`, arrays [layer, expert, ...].

    Routed layers hold E experts in the stored model, and K after `experts.gather`. Vanilla layers
    hold one.
    """

    config: ModelConfig
    side: str  # "encoder" or "decoder"
    placement: Placement | None = None

    def setup(self) -> None:
        layer = DecoderLayer if self.side == "decoder" else EncoderLayer
        kinds = {kind for kind, _ in layer_runs(self.config, self.side)}
        if "routed" in kinds:
            self.routed = layer(self.config)
        if "vanilla" in kinds:
            self.vanilla = layer(self.config)

    def __call__(
        self,
        x_RxLxD: jax.Array,
        rows: Sequence[jax.Array],
        shared: Sequence[Any],
        dispatch: Any,
        train: bool,
    ) -> jax.Array:
        """[R, L, D] -> [R, L, D].

        Args:
            rows: further arguments of a layer per row: arrays with leading axis R.
            shared: further arguments that all rows share.
            dispatch: the dispatch of this side's routed layers (see `dispatch`); None if each has
                one expert.
        """
        if self.is_initializing():
            return self._create(x_RxLxD, rows, shared)
        for kind, place in layer_runs(self.config, self.side):
            own = None if kind == "vanilla" else dispatch
            own = jax.tree.map(lambda a, place=place: a[place], own)
            x_RxLxD = self._run(kind, place, x_RxLxD, rows, (*shared, not train), own)
        return x_RxLxD

    def _run(self, kind, place, x, rows, shared, dispatch) -> jax.Array:
        """Applies a run of layers of one kind."""
        prefix = f"{self.side}/layers/{kind}/"
        layers = getattr(self, kind)
        depth, experts = jax.tree.leaves(layers.variables["params"])[0].shape[:2]
        count = place.stop - place.start

        def body(layer, x, dispatch_of_layer):
            if dispatch_of_layer is not None:
                args = (layer, x, rows, shared, self.placement, prefix)
                return dispatch_of_layer(*args), None
            if self.placement is None:
                return layer(x, *rows, *shared), None

            def whole(params):
                return self.placement.gather(params, prefix, stacked=2)

            return with_params(layer, whole, x, *rows, *shared), None

        kept, unroll = self.config.kept_activations, min(count, self.config.unroll_layers)
        if kept != "all" or self.placement is not None:
            # XLA would merge what is computed again with its first computation, and so keep it. A
            # loop over layers prevents that, because both are in different loops.
            body = nn.remat(body, policy=POLICIES[kept], prevent_cse=unroll == count)
        scan = nn.scan(
            body, variable_axes={"params": 0, "intermediates": 0}, split_rngs={"dropout": True},
            length=count, unroll=unroll,
        )  # fmt: skip

        def prepare(variables):
            # Outside the scan, whose backward pass would otherwise keep a copy of all weights.
            if count < depth:
                variables = jax.tree.map(lambda p: p[place], variables)
            if experts == 1:
                variables = jax.tree.map(lambda p: p[:, 0], variables)
            if unroll == count and self.placement is None:
                # Once, and not again in the backward pass. Of a loop, it would make a second stack.
                variables = cast_matrices(variables, self.config.dtype)
            return variables

        run = nn.map_variables(
            lambda layer, x, dispatch: scan(layer, x, dispatch)[0], "params", trans_in_fn=prepare
        )
        return run(layers, x, dispatch)

    def _create(self, x, rows, shared) -> jax.Array:
        """Makes the parameters of every layer: E copies, each with its own Gaussian noise."""
        runs = layer_runs(self.config, self.side)
        for kind, experts in (("routed", self.config.experts), ("vanilla", 1)):
            count = sum(p.stop - p.start for k, p in runs if k == kind)
            if not count:
                continue
            # Without this random stream there is no noise: see `blocks.param`.
            noise = {"experts": True} if experts > 1 else {}

            def lift(function, name, size, split, noise=noise):
                return nn.vmap(
                    function, variable_axes={"params": 0}, split_rngs={"params": split, **noise},
                    in_axes=None, axis_size=size, metadata_params={nn.PARTITION_NAME: name},
                )  # fmt: skip

            copies = lift(lambda layer, x: layer(x, *rows, *shared, True), "expert", experts, False)
            lift(copies, "layer", count, True)(getattr(self, kind), x)
        return x
