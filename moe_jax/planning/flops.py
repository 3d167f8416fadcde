"""Counts the matrix products of a traced function."""

import math
from typing import Any

import jax
from jax.extend.core import jaxprs_in_params


def flops(function: Any, *args: Any) -> float:
    """Floating-point operations of all matrix products in one call, on one device.

    A loop's body counts once per iteration (in a `while_loop`, whose length is unknown, once).
    Operations that rematerialisation repeats count again, and those of a kernel are its estimate.
    Inside `shard_map`, shapes are one device's; axes left to the partitioner are divided by the
    size of the mesh axis `model`.

    Args:
        args: arrays or `jax.ShapeDtypeStruct`s.
    """
    model = jax.sharding.get_abstract_mesh().shape.get("model", 1)
    return _of_jaxpr(jax.make_jaxpr(function)(*args).jaxpr, model)


def _of_jaxpr(jaxpr: Any, devices: int) -> float:
    """Operations of one device, where each product is spread over so many."""
    total = 0.0
    for equation in jaxpr.eqns:
        match equation.primitive.name:
            case "dot_general":
                total += _of_product(equation) / devices
            case "scan":
                body = equation.params["jaxpr"].jaxpr
                total += equation.params["length"] * _of_jaxpr(body, devices)
            case "cond":
                branches = equation.params["branches"]
                total += max(_of_jaxpr(branch.jaxpr, devices) for branch in branches)
            case "shard_map":
                model = equation.params["mesh"].shape.get("model", 1)
                split = "model" in equation.params["newly_manual_axes"]  # shapes are one device's
                total += _of_jaxpr(equation.params["jaxpr"], 1 if split else model)
            case "pallas_call":
                cost = equation.params["cost_estimate"]
                total += cost.flops if cost else 0.0
            case _:
                for inner in jaxprs_in_params(equation.params):
                    total += _of_jaxpr(inner, devices)
    return total


def _of_product(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    sums = math.prod(left[axis] for axis in contracted)
    return 2.0 * sums * math.prod(equation.outvars[0].aval.shape)
