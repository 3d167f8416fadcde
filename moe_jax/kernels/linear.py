"""The matrix product of every layer, with its backward pass written out."""

import math
from functools import partial

import jax


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def linear(x: jax.Array, kernel: jax.Array, contracted: int = 1) -> jax.Array:
    """Product over the last `contracted` axes of x and as many first axes of the kernel.

    The gradient of the kernel is computed as x^T dy, in the kernel's own order. JAX's transposition
    asks for dy^T x, for which XLA transposes dy on CPU, and all that is fused into it: twice the
    time of a feed-forward block (`docs/performance.md`). Of x with one leading axis, XLA makes a
    plain transpose, which is far faster than one fused with a reshape; a kernel that is a matrix it
    multiplies with as it lies, and others it transposes first.
    """
    return _dot(x, kernel, _last(x, contracted), tuple(range(contracted)))


def _forward(x, kernel, contracted):
    return linear(x, kernel, contracted), (x, kernel)


def _backward(contracted, residuals, dy):
    x, kernel = residuals
    x_Tx, dy_Tx = (a.reshape(-1, *a.shape[x.ndim - contracted :]) for a in (x, dy))
    d_kernel = _dot(x_Tx, dy_Tx, (0,), (0,))
    if jax.sharding.get_abstract_mesh().shape.get("model", 1) == 1:
        kernel_IxO = kernel.reshape(math.prod(kernel.shape[:contracted]), -1)
        dy_TxO = dy_Tx.reshape(-1, kernel_IxO.shape[1])
        dx = _dot(dy_TxO, kernel_IxO, (1,), (1,)).reshape(x.shape)
    else:  # sharded axes are better not merged with others
        outputs = _last(dy, kernel.ndim - contracted)
        dx = _dot(dy, kernel, outputs, tuple(range(contracted, kernel.ndim)))
    return dx, d_kernel


def _dot(a: jax.Array, b: jax.Array, axes_of_a: tuple[int, ...], axes_of_b: tuple[int, ...]):
    return jax.lax.dot_general(a, b, ((axes_of_a, axes_of_b), ((), ())))


def _last(x: jax.Array, count: int) -> tuple[int, ...]:
    return tuple(range(x.ndim - count, x.ndim))


linear.defvjp(_forward, _backward)
