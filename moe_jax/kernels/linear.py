"""The matrix product of every layer and its bias, with their backward passes written out."""

import jax
import jax.numpy as jnp


@jax.custom_vjp
def linear(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Product over the last axis of x [..., I] and the first axis of the kernel [I, ...].

    The gradient of the kernel is computed as x^T dy, in the kernel's axis order. JAX's own gradient
    is dy^T x, for which XLA transposes dy on CPU, with all operations fused into it. That doubles
    the time of a feed-forward block (`docs/performance.md`). x is reshaped to one leading axis,
    because a plain transpose is much faster than one fused with a reshape. On CPU, the kernel is
    reshaped to a matrix, because XLA transposes kernels with more axes there; a TPU would copy dy.
    """
    return _dot(x, kernel, (x.ndim - 1,), (0,))


def _forward(x, kernel):
    return linear(x, kernel), (x, kernel)


def _backward(residuals, dy):
    x, kernel = residuals
    x_TxI = x.reshape(-1, x.shape[-1])
    dy_Tx = dy.reshape(-1, *kernel.shape[1:])
    d_kernel = _dot(x_TxI, dy_Tx, (0,), (0,))
    if jax.sharding.get_abstract_mesh().shape.get("model", 1) == 1:
        dx = jax.lax.platform_dependent(dy, kernel, cpu=_dx_by_matrix, default=_dx)
    else:  # merging sharded axes would move data
        dx = _dx(dy, kernel)
    return dx, d_kernel


def _dx(dy: jax.Array, kernel: jax.Array) -> jax.Array:
    outputs = kernel.ndim - 1
    return _dot(dy, kernel, tuple(range(dy.ndim - outputs, dy.ndim)), tuple(range(1, kernel.ndim)))


def _dx_by_matrix(dy: jax.Array, kernel: jax.Array) -> jax.Array:
    inputs = kernel.shape[0]
    leading = dy.shape[: dy.ndim - kernel.ndim + 1]
    dy_TxO = dy.reshape(-1, kernel.size // inputs)
    return _dot(dy_TxO, kernel.reshape(inputs, -1), (1,), (1,)).reshape(*leading, inputs)


def _dot(a: jax.Array, b: jax.Array, axes_of_a: tuple[int, ...], axes_of_b: tuple[int, ...]):
    return jax.lax.dot_general(a, b, ((axes_of_a, axes_of_b), ((), ())))


linear.defvjp(_forward, _backward)


@jax.custom_vjp
def add_bias(y: jax.Array, bias: jax.Array | None) -> jax.Array:
    """y [..., O] plus a bias [O], which may have more axes, in the dtype of y; y if there is none.

    The gradient of the bias is summed over tokens in float32. JAX sums it in the dtype of y; in
    bfloat16, CPUs and GPUs then add one token to the sum of many, and lose it in rounding.
    """
    return y if bias is None else y + bias.astype(y.dtype)


def _bias_backward(bias, dy):
    if bias is None:
        return dy, None
    tokens = tuple(range(dy.ndim - bias.ndim))
    return dy, jnp.sum(dy, tokens, dtype=jnp.float32).astype(bias.dtype)


add_bias.defvjp(lambda y, bias: (add_bias(y, bias), bias), _bias_backward)
