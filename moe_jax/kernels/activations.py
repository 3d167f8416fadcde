"""Activation functions that compute in float32 and keep only their input for the backward pass;
`relu` needs neither, and keeps a mask.

JAX's exact GELU goes through `erfc`. XLA computes it by two formulas and selects one, and splits it
in bfloat16, so that a GPU writes what is between to memory. `erf` has one formula; PyTorch computes
GELU by it, too.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def _gelu(x: jax.Array) -> jax.Array:
    return 0.5 * x * (1.0 + jax.lax.erf(x * 0.5**0.5))


def _gelu_tanh(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=True)


def _recomputed(function: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """A function of single numbers, in float32, whose gradient is computed from its input."""

    def in_float32(x: jax.Array) -> jax.Array:
        return function(x.astype(jnp.float32))

    @jax.custom_vjp
    def run(x: jax.Array) -> jax.Array:
        return in_float32(x).astype(x.dtype)

    def backward(x: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
        _, pull_back = jax.vjp(in_float32, x)
        return pull_back(dy.astype(jnp.float32))

    run.defvjp(lambda x: (run(x), x), backward)
    return run


# By their name in `Family.activation`.
ACTIVATIONS = {
    "gelu": _recomputed(_gelu),
    "gelu_tanh": _recomputed(_gelu_tanh),
    "relu": jax.nn.relu,
    "silu": _recomputed(jax.nn.silu),
}
