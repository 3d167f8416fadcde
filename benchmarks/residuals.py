"""What the layers of `bart_large` keep for the backward pass, counted without running them.

    python -m benchmarks.residuals [--json FILE]

Traces the forward pass of both stacks of layers: 16 rows of 512 tokens, bfloat16, dropout 0.1.
Every array that the backward pass reads counts, except the parameters themselves. The ratios are
bytes per token and layer, divided by the width D.
"""

import math
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks import common
from moe_jax.model.config import ModelConfig
from moe_jax.model.routed_stack import RoutedStack
from moe_jax.training.step import PRNG

ROWS, LENGTH = 16, 512


def main() -> None:
    args = common.parse(common.parser(__doc__))
    report = common.Report("residuals", args)
    size = "bart_large" if args.scale == "full" else "small"
    for kept, suffix in (("products", ""), ("all", "_all"), ("inputs", "_inputs")):
        config = ModelConfig(**common.SIZES[size] | {"dtype": "bfloat16", "kept_activations": kept})
        for side, prefix in (("encoder", ""), ("decoder", "decoder_")):
            arrays = saved(config, side)
            per_layer = ROWS * LENGTH * getattr(config, f"{side}_layers") * config.d_model
            for shape, (count, total) in table(arrays).items():
                facts = {"array": shape, "count": count, "per_token_per_d": total / per_layer}
                report.fact(f"{side}, {kept}", **facts)
            name = f"{prefix}residual_bytes_per_token_per_d{suffix}"
            report.ratio(name, sum(map(size_in_bytes, arrays)) / per_layer)
    report.finish()


def saved(config: ModelConfig, side: str) -> list[jax.ShapeDtypeStruct]:
    """The arrays that one side's layers keep in training, without parameters."""
    stack = RoutedStack(config, side)
    x = jax.ShapeDtypeStruct((ROWS, LENGTH, config.d_model), config.dtype)
    segments = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
    rows = (segments,) if side == "encoder" else (x, segments, segments)
    key = jax.eval_shape(partial(jax.random.key, 0, impl=PRNG))
    variables = nn.meta.unbox(
        jax.eval_shape(lambda key, *a: stack.init(key, *a, (None,), None, False), key, x, rows)
    )
    result = []

    def forward(params: Any, x: jax.Array, rows: tuple[jax.Array, ...], key: jax.Array):
        def run(params, x, encoded):
            given = (encoded, *rows[1:]) if side == "decoder" else rows
            return stack.apply(
                {"params": params}, x, given, (None,), None, True, rngs={"dropout": key}
            )

        y, pull_back = jax.vjp(run, params, x, rows[0] if side == "decoder" else None)
        # Parameters without their axis of one expert are the same memory.
        own = {(p.dtype, (p.shape[0], *p.shape[2:])) for p in jax.tree.leaves(params)}
        kept = {id(leaf): leaf for leaf in jax.tree.leaves(pull_back)}
        result.extend(
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
            for leaf in kept.values()
            if (leaf.dtype, leaf.shape) not in own
        )
        return y

    jax.eval_shape(forward, variables["params"], x, rows, key)
    return result


def size_in_bytes(array: jax.ShapeDtypeStruct) -> int:
    """Bytes of an array; keys of random streams count as none."""
    is_key = jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
    return 0 if is_key else array.dtype.itemsize * math.prod(array.shape)


def table(arrays: list[jax.ShapeDtypeStruct]) -> dict[str, tuple[int, int]]:
    """Arrays of one kind together, largest first: `bfloat16[12,16,512,1024]` -> (count, bytes)."""
    result: dict[str, tuple[int, int]] = {}
    for array in arrays:
        name = f"{array.dtype}[{','.join(map(str, array.shape))}]"
        count, total = result.get(name, (0, 0))
        result[name] = (count + 1, total + size_in_bytes(array))
    return dict(sorted(result.items(), key=lambda item: -item[1][1]))


if __name__ == "__main__":
    common.run(main)
