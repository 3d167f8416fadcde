"""Parameter trees of experts: layers stacked on leading axes [layer, expert]."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

Params = Any  # a tree of arrays


def copy_expert(params: Params, experts: int, noise: float, key: jax.Array) -> Params:
    """Copies of a single expert, which differ by Gaussian noise of standard deviation `noise`.

    Args:
        params: arrays [layer, 1, ...].

    Returns:
        Arrays [layer, experts, ...].
    """
    if not noise:
        return jax.tree.map(lambda p: jnp.broadcast_to(p, (len(p), experts, *p.shape[2:])), params)
    # One draw for all parameters of a copy compiles faster than many; one copy after the other
    # takes less memory, because every device draws all numbers.
    flat, unravel = ravel_pytree(params)

    def copy(key: jax.Array) -> Params:
        return unravel(flat + noise * jax.random.normal(key, flat.shape, flat.dtype))

    copies = jax.lax.map(copy, jax.random.split(key, experts))
    return jax.tree.map(lambda p: jnp.moveaxis(p[:, :, 0], 0, 1), copies)


def gather(
    backbone: Params, index_NxK: jax.Array, unroll: int = 1, dtype: str | None = None
) -> Params:
    """Takes K experts of every routed layer: weights are routed, not tokens.

    With K = 1 the result is a plain dense model (the mixture *squeezed* for one task).

    Args:
        backbone: parameters of `EncoderDecoder` with E experts.
        index_NxK: int, which experts to take in each of the N routed layers, encoder first.
        unroll: slices per iteration of the loop. If it is the `unroll_layers` of a model with all
            layers unrolled, each layer reads its slice and XLA never makes the stack.
        dtype: of the taken matrices of weights, if it is another.
    """
    result = backbone
    for side, stack, index in routed(backbone, index_NxK):

        def take(_, at, stack=stack):
            taken = jax.tree.map(lambda p: p[at[0], at[1]], stack)
            return None, cast_matrices(taken, dtype) if dtype else taken

        # A loop of slices, because XLA's gather is slower on CPU.
        _, taken_P = jax.lax.scan(take, None, places(index), unroll=unroll)
        taken = jax.tree.map(lambda p, i=index: p.reshape(*i.shape, *p.shape[1:]), taken_P)
        result = replace_routed(result, side, taken)
    return result


def cast(weights: jax.Array, dtype: str) -> jax.Array:
    """Weights in another dtype; no cast is moved out of a loop."""
    if jnp.dtype(dtype).itemsize < weights.dtype.itemsize:
        # Changes no number. A TPU's compiler moves a cast alone out of the loop over layers, and
        # then casts all experts of all layers.
        info = jnp.finfo(dtype)
        weights = jax.lax.reduce_precision(weights, info.nexp, info.nmant)
    return weights.astype(dtype)


def cast_matrices(params: Params, dtype: str) -> Params:
    """Layers whose matrices have another dtype. Norms and biases stay as they are."""

    def one(path, p):
        return cast(p, dtype) if path[-1].key.endswith("kernel") else p

    return jax.tree_util.tree_map_with_path(one, params)


def merge(backbone: Params, weights_NxE: jax.Array) -> Params:
    """A plain dense model whose routed layers are weighted means of their experts' parameters.

    One-hot weights give what `gather` gives with K = 1. Soft weights give another function than a
    mixture of the experts' outputs, at the cost of one expert; its gradient by the weights says
    how much of each expert helps.

    Args:
        backbone: parameters of `EncoderDecoder` with E experts.
        weights_NxE: of the experts in each of the N routed layers, encoder first; they sum to 1.

    Returns:
        The backbone with one expert in each layer.
    """
    result = backbone
    for side, stack, weights in routed(backbone, weights_NxE):

        def mean(p, w=weights):
            return jnp.einsum("ne,ne...->n...", w.astype(p.dtype), p)[:, None]

        result = replace_routed(result, side, jax.tree.map(mean, stack))
    return result


def scatter_add(total: Params, gathered: Params, index_NxK: jax.Array, unroll: int = 1) -> Params:
    """Adds gradients of a gathered backbone to those of the whole backbone; transpose of `gather`.

    `unroll` as in `gather`: each layer's gradients are added in place, without a stack.
    """
    sums, rest = {}, [total, gathered]
    for side, stack, index in routed(total, index_NxK):

        def add_one(stack, addend):
            at, value = addend

            def one(total, gradient):
                args = (total, gradient.astype(total.dtype), at)
                return jax.lax.platform_dependent(*args, cpu=_add_at, default=_add_in_place)

            return jax.tree.map(one, stack, value), None

        values = gathered[side]["layers"]["routed"]
        values_P = jax.tree.map(lambda v: v.reshape(-1, *v.shape[2:]), values)
        sums[side], _ = jax.lax.scan(add_one, stack, (places(index), values_P), unroll=unroll)
        rest = [replace_routed(tree, side, ()) for tree in rest]
    result = jax.tree.map(jnp.add, *rest)
    for side, stack in sums.items():
        result = replace_routed(result, side, stack)
    return result


def sum_by_expert(gathered_W: Params, index_WxNxK: jax.Array, experts: int) -> Params:
    """The sum of `scatter_add` of W gathered backbones to zeros of so many experts.

    Every expert looks at all W gradients, so that a GPU starts one operation for each parameter. On
    a CPU, adding one after the other is faster.
    """
    index_NxWxK = jnp.moveaxis(index_WxNxK, 0, 1)
    result = jax.tree.map(lambda g: g.sum(0), gathered_W)
    for side, _, index_LxWxK in routed(result, index_NxWxK):
        is_its_LxWxKxE = index_LxWxK[..., None] == jnp.arange(experts)

        def total(gradient, is_its=is_its_LxWxKxE):
            is_its = is_its.reshape(*is_its.shape, *[1] * (gradient.ndim - 3))
            gradient = jnp.moveaxis(gradient, 0, 1)[:, :, :, None].astype(jnp.float32)
            return jnp.where(is_its, gradient, 0.0).sum((1, 2))

        layers = gathered_W[side]["layers"]["routed"]
        result = replace_routed(result, side, jax.tree.map(total, layers))
    return result


def _add_at(total: jax.Array, addend: jax.Array, at: jax.Array) -> jax.Array:
    return total.at[at[0], at[1]].add(addend)


def _add_in_place(total: jax.Array, addend: jax.Array, at: jax.Array) -> jax.Array:
    """`_add_at` without the copy that a GPU makes there; on a CPU, one core does it."""
    begin = (*at, *[0] * addend.ndim)
    old = jax.lax.dynamic_slice(total, begin, (1, 1, *addend.shape))
    return jax.lax.dynamic_update_slice(total, old + addend, begin)


def share(params: Params, part: float) -> Params:
    """(1 - part) * each expert + part * the sum of all experts of its layer.

    All other parameters, or their gradients, stay as they are.
    """

    def mixed(path, p):
        if "routed" not in (getattr(key, "key", "") for key in path):
            return p
        return (1 - part) * p + part * p.sum(1, keepdims=True)

    return jax.tree_util.tree_map_with_path(mixed, params)


def places(index_LxK: jax.Array) -> jax.Array:
    """(layer, expert) of every gathered expert: int [L * K, 2]."""
    layers = jnp.broadcast_to(jnp.arange(index_LxK.shape[0])[:, None], index_LxK.shape)
    return jnp.stack([layers.ravel(), index_LxK.ravel().astype(layers.dtype)], axis=1)


def routed(backbone: Params, *arrays_NxK: jax.Array) -> list[tuple[Any, ...]]:
    """(side, its routed layers, its part of each array), for each side with routed layers."""
    result, start = [], 0
    for side in ("encoder", "decoder"):
        if "routed" in backbone[side]["layers"]:
            stack = backbone[side]["layers"]["routed"]
            stop = start + jax.tree.leaves(stack)[0].shape[0]
            result.append((side, stack, *(a[start:stop] for a in arrays_NxK)))
            start = stop
    return result


def replace_routed(backbone: Params, side: str, routed: Params) -> Params:
    """`backbone` with the routed layers of one side replaced."""
    layers = {**backbone[side]["layers"], "routed": routed}
    return {**backbone, side: {**backbone[side], "layers": layers}}
