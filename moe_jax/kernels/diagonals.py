"""Matrices with one number per diagonal, such as a bias by relative positions."""

import jax
import jax.numpy as jnp


def from_diagonals(x: jax.Array, rows: int, columns: int) -> jax.Array:
    """[..., rows + columns - 1] -> [..., rows, columns]; element (i, j) is x[i - j + columns - 1].

    Nothing is gathered: rows that are one number longer than they are read shift each by one.
    """
    wide = rows + columns
    x = jnp.pad(jnp.flip(x, -1), [(0, 0)] * (x.ndim - 1) + [(0, 1)])
    x = jnp.broadcast_to(x[..., None, :], (*x.shape[:-1], rows, wide))
    x = x.reshape(*x.shape[:-2], rows * wide)[..., : rows * (wide - 1)]
    return x.reshape(*x.shape[:-1], rows, wide - 1)[..., rows - 1 :]


def sum_diagonals(x: jax.Array) -> jax.Array:
    """[..., rows, columns] -> [..., rows + columns - 1]: the transpose of `from_diagonals`."""
    *leading, rows, columns = x.shape
    like = jax.ShapeDtypeStruct((*leading, rows + columns - 1), x.dtype)
    (sums,) = jax.linear_transpose(lambda d: from_diagonals(d, rows, columns), like)(x)
    return sums
