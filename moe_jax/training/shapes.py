"""Parameters of one model in the shapes of another: experts, vanilla layers, the task table."""

from typing import Any

import jax
import numpy as np

from moe_jax.core.errors import UserError
from moe_jax.model.config import ModelConfig
from moe_jax.model.experts import Params, copy_expert
from moe_jax.model.task_moe import parameter_shapes


def check_shapes(found: dict[str, list[int]], wanted: dict[str, list[int]], source: Any) -> None:
    """Raises a UserError that names the first parameter with another shape."""
    for name in sorted(wanted | found):
        if found.get(name) != wanted.get(name):
            has = f"has shape {found[name]}" if name in found else "is absent"
            needs = f"needs shape {wanted[name]}" if name in wanted else "has no such parameter"
            raise UserError(f"{source}: {name} {has}, the model {needs}")


def split_layers(backbone: Params, config: ModelConfig) -> Params:
    """Moves the vanilla layers of `config` out of a dense backbone's routed layers."""
    result = {**backbone}
    for side in ("encoder", "decoder"):
        layers = backbone[side]["layers"]
        vanilla = list(getattr(config, f"{side}_vanilla_layers"))
        depth, experts = jax.tree.leaves(layers)[0].shape[:2]
        same_depth = depth == getattr(config, f"{side}_layers")
        if vanilla and list(layers) == ["routed"] and experts == 1 and same_depth:
            places = {"routed": [i for i in range(depth) if i not in vanilla], "vanilla": vanilla}
            layers = {
                kind: jax.tree.map(lambda p, at=at: p[at], layers["routed"])
                for kind, at in places.items()
                if at
            }
        result[side] = {**backbone[side], "layers": layers}
    return result


def fit_backbone(
    backbone: Params,
    like: Params,
    noise: float,
    key: jax.Array,
    source: Any,
    sharding: Any = None,
) -> Params:
    """A loaded backbone in the shape of `like`, on the devices. A single expert is copied to all
    experts, plus noise.

    Args:
        like: arrays, or only their shapes.
        sharding: of the result, if it is sharded. It does not cut the axis of experts.

    Raises:
        UserError: the architecture differs, or the number of experts is neither one nor E.
    """
    experts = {side: _experts(like, side) for side in ("encoder", "decoder")}
    single = {side for side, count in experts.items() if _experts(backbone, side) == 1 < count}

    def filled(backbone: Params, key: jax.Array) -> Params:
        result = {**backbone}
        for i, side in enumerate(sorted(single)):
            layers = backbone[side]["layers"]
            own = jax.random.fold_in(key, i)
            layers = {**layers, "routed": copy_expert(layers["routed"], experts[side], noise, own)}
            result[side] = {**backbone[side], "layers": layers}
        return result

    shapes = parameter_shapes(jax.eval_shape(filled, backbone, key))
    check_shapes(shapes, parameter_shapes(like), source)
    # Every device gets its shards of one expert, and makes those of all copies from them.
    backbone = jax.device_put(backbone, sharding)
    return jax.jit(filled, out_shardings=sharding)(backbone, key) if single else backbone


def _experts(backbone: Params, side: str) -> int:
    """How many experts the routed layers of a side have; 0 without such layers."""
    routed = backbone.get(side, {}).get("layers", {}).get("routed")
    return jax.tree.leaves(routed)[0].shape[1] if routed else 0


def fit_table(params: Params, like: Params, found: list[str], tasks: list[str], source: Any):
    """Router and representations of another run, rows matched by task name.

    Raises:
        UserError: the router has another shape, or a task has no row.
    """
    missing = [task for task in tasks if task not in found]
    if missing:
        raise UserError(f"{source}: its task table has no {missing[0]!r}")
    rows = np.array([found.index(task) for task in tasks])
    result = {
        "router": params["router"],
        "representations": np.asarray(params["representations"])[rows],
    }
    check_shapes(parameter_shapes(result), parameter_shapes({k: like[k] for k in result}), source)
    return result
