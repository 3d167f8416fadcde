"""Experts: whole layers stacked on leading axes [layer, expert]. Initialise, gather and mix."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

Params = Any


def init_experts(
    init: Callable[[jax.Array], Params], key: jax.Array, layers: int, count: int, noise: float
) -> Params:
    """Fresh layers, each with `count` copies told apart by Gaussian noise.

    Args:
        init: key -> parameters of one layer.
        noise: standard deviation; a single expert gets none, so that E=1 is the dense model.

    Returns:
        The parameters of a layer with leading axes [layer, expert].
    """
    key, noise_key = jax.random.split(key)
    params_LxP = jax.vmap(init)(jax.random.split(key, layers))
    params_LxExP = jax.tree.map(lambda p: jnp.repeat(p[:, None], count, axis=1), params_LxP)
    if count > 1 and noise:
        params_LxExP = add_noise(params_LxExP, noise_key, noise)
    for axis in ("expert", "layer"):
        params_LxExP = nn.meta.add_axis(params_LxExP, 0, {nn.PARTITION_NAME: axis})
    return params_LxExP


def add_noise(params: Params, key: jax.Array, scale: float) -> Params:
    """Adds independent Gaussian noise of standard deviation `scale` to every parameter."""
    flat, unravel = ravel_pytree(params)  # one draw for all: it compiles faster than many
    return unravel(flat + scale * jax.random.normal(key, flat.shape, flat.dtype))


def gather(backbone: Params, index_NxK: jax.Array) -> Params:
    """The backbone with only K experts per routed layer: the weights are routed, not the tokens.

    With K = 1 this is a plain dense model (the mixture *squeezed* for one task).

    Args:
        backbone: parameters of `EncoderDecoder` with E experts.
        index_NxK: int, which experts to take in each of the N routed layers, encoder first.
    """
    result = backbone
    for side, stack, index in _routed(backbone, index_NxK):

        def take(at, stack=stack):
            return jax.tree.map(lambda p: p[at[0], at[1]], stack)

        # A loop of slices: XLA's gather is slower on CPU.
        taken_P = jax.lax.map(take, _places(index))
        taken = jax.tree.map(lambda p, i=index: p.reshape(*i.shape, *p.shape[1:]), taken_P)
        result = _replace(result, side, taken)
    return result


def scatter_add(total: Params, gathered: Params, index_NxK: jax.Array) -> Params:
    """Adds gradients of a gathered backbone to those of the whole one; transpose of `gather`."""
    sums = _scatter(total, gathered, index_NxK, lambda t, at, g: t.at[at].add(g))
    rest = [total, gathered]
    for side in sums:
        rest = [_replace(tree, side, ()) for tree in rest]
    result = jax.tree.map(jnp.add, *rest)
    for side, stack in sums.items():
        result = _replace(result, side, stack)
    return result


def scatter_set(
    total: Params, gathered: Params, index_NxK: jax.Array, valid_NxK: jax.Array
) -> Params:
    """`total` with its experts of the index replaced where valid; all else is of `gathered`."""

    def set_one(t, at, g, valid):
        return t.at[at].set(jnp.where(valid, g, t[at]))

    result = gathered
    for side, stack in _scatter(total, gathered, index_NxK, set_one, valid_NxK).items():
        result = _replace(result, side, stack)
    return result


def _scatter(
    total: Params,
    gathered: Params,
    index_NxK: jax.Array,
    update: Callable[..., jax.Array],
    *flags_NxK: jax.Array,
) -> dict[str, Params]:
    """For each side, the routed layers of `total` after the gathered experts came back one by one.

    Args:
        update: (array [layer, expert, ...], (layer, expert), what was gathered, *flags) -> array.
        flags_NxK: what `update` is told of every gathered expert.
    """
    stacks = {}
    for side, stack, index, *flags in _routed(total, index_NxK, *flags_NxK):

        def one(stack, place):
            at, value, *flags = place
            return jax.tree.map(
                lambda t, v: update(t, (at[0], at[1]), v, *flags), stack, value
            ), None

        values = gathered[side]["layers"]["routed"]
        values_P = jax.tree.map(lambda v: v.reshape(-1, *v.shape[2:]), values)
        places = (_places(index), values_P, *(f.ravel() for f in flags))
        stacks[side], _ = jax.lax.scan(one, stack, places)
    return stacks


def _places(index_LxK: jax.Array) -> jax.Array:
    """(layer, expert) of every gathered expert: int [L * K, 2]."""
    layers = jnp.broadcast_to(jnp.arange(index_LxK.shape[0])[:, None], index_LxK.shape)
    return jnp.stack([layers.ravel(), index_LxK.ravel().astype(layers.dtype)], axis=1)


def _routed(backbone: Params, *arrays_NxK: jax.Array) -> list[tuple[Any, ...]]:
    """(side, its routed layers, its part of each array) of each side that has them."""
    result, start = [], 0
    for side in ("encoder", "decoder"):
        if "routed" in backbone[side]["layers"]:
            stack = backbone[side]["layers"]["routed"]
            stop = start + jax.tree.leaves(stack)[0].shape[0]
            result.append((side, stack, *(a[start:stop] for a in arrays_NxK)))
            start = stop
    return result


def _replace(backbone: Params, side: str, routed: Params) -> Params:
    """`backbone` with other routed layers on one side."""
    layers = {**backbone[side]["layers"], "routed": routed}
    return {**backbone, side: {**backbone[side], "layers": layers}}


def mix(apply: Callable[[Params], jax.Array], params_K: Params, weights_K: jax.Array) -> jax.Array:
    """Sum over experts of weight times output (paper section 4, equation 1).

    Args:
        apply: parameters of one layer -> output.
        params_K: parameters stacked on a leading axis of K experts.
        weights_K: the route; or [K, R], that of each row.
    """
    y_Kx = jax.vmap(apply)(params_K)
    if weights_K.ndim == 1:
        return jnp.tensordot(weights_K.astype(y_Kx.dtype), y_Kx, axes=1)
    return jnp.einsum("kr,kr...->r...", weights_K.astype(y_Kx.dtype), y_Kx)
