"""A task's plain model: one expert, or the experts' mean, in every routed layer."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.core.errors import UserError, nearest
from moe_jax.data.vocabulary import Vocabulary
from moe_jax.model.backbone import EncoderDecoder
from moe_jax.model.config import ModelConfig
from moe_jax.model.experts import Params
from moe_jax.model.routed_stack import layer_runs
from moe_jax.model.task_moe import routes_of
from moe_jax.runs.load import Run

_ONE = 1 - 1e-6  # a weight of one, up to rounding
_PROBE = (8, 32)  # rows and length of random tokens, for measuring an approximation


def plain_model(
    run: Run, task: str | None, own: Vocabulary, *, average: bool, approximate: bool
) -> tuple[ModelConfig, Params, str]:
    """The dense model of a task.

    Args:
        task: the task whose expert is taken in every routed layer.
        own: the run's vocabulary.
        average: takes the mean of the experts' parameters instead, weighted by the task's route, or
            uniform without a task.
        approximate: if the route is soft, takes the expert with the largest weight.

    Returns:
        Its configuration, its NumPy backbone (one expert, no vanilla layers), and a description,
        with the measured error of an approximation.

    Raises:
        UserError: no such task, or a soft route without `average` or `approximate`.
    """
    weights_NxE, how = _weights(run, task, average, approximate)
    config = run.model.config
    plain = squeeze(run.params["backbone"], config, weights_NxE)
    dense = dataclasses.replace(
        config, experts=1, encoder_vanilla_layers=(), decoder_vanilla_layers=()
    )
    size = sum(p.size for p in jax.tree.leaves(plain))
    words = f"a {config.architecture} of {size:,} parameters{how}"
    if run.model.routed and task is not None:
        route_NxE = _route(run, task)
        if not np.array_equal(route_NxE, weights_NxE) or not _is_hard(route_NxE):
            words += f"; {_error(run, route_NxE, dense, plain, own)}"
    return dense, plain, words


def _weights(
    run: Run, task: str | None, average: bool, approximate: bool
) -> tuple[np.ndarray, str]:
    """The weight of each expert's parameters, [N, E], and a description."""
    shape = (run.model.layers, run.model.config.experts)
    if task is not None and task not in run.task_ids:
        raise UserError(f"the task table has no {task!r}{nearest(task, run.task_ids)}")
    if not run.model.routed:
        return np.ones(shape, np.float32), ""
    if task is None:
        if not average:
            known = sorted(run.task_ids)
            known = [*known[:5], "..."] if len(known) > 5 else known
            raise UserError(
                f"which task's experts? Give --task NAME, one of {', '.join(known)}, or --average "
                "for all experts alike"
            )
        return np.full(shape, 1 / shape[1], np.float32), ", the mean of all experts of each layer"
    route_NxE = _route(run, task)
    if average:
        return route_NxE, f", each layer's experts averaged by the route of {task}"
    if not _is_hard(route_NxE) and not approximate:
        largest_N = route_NxE.max(-1)
        n = int(largest_N.argmin())
        raise UserError(
            f"the route of {task} is soft: {run.model.config.routed_layers[n]} mixes the outputs"
            f" of several experts, none with more than {largest_N[n]:.2f} of the weight, which no"
            " single layer computes. --approximate takes the largest one and measures the error,"
            " --average averages their parameters; a hard selection (argmax, gumbel_softmax_st,"
            " top_k with one expert) needs neither"
        )
    one_hot_NxE = np.eye(shape[1], dtype=np.float32)[route_NxE.argmax(-1)]
    return one_hot_NxE, f", the experts of {task}"


def _route(run: Run, task: str) -> np.ndarray:
    """The route of a task at evaluation: float32 [N, E]."""
    return np.asarray(
        jax.jit(partial(routes_of, run.model))(run.params, run.step)[run.task_ids[task]]
    )


def _is_hard(route_NxE: np.ndarray) -> bool:
    return bool(np.all(route_NxE.max(-1) >= _ONE))


def squeeze(backbone: Params, config: ModelConfig, weights_NxE: np.ndarray) -> Params:
    """A dense backbone without vanilla layers: each layer the weighted mean of its experts.

    Args:
        backbone: NumPy parameters of `EncoderDecoder` with E experts.
        weights_NxE: weights of the experts in each routed layer, encoder first; one-hot selects one
            expert.
    """
    routed = iter(weights_NxE)
    result = {**backbone}
    for side in ("encoder", "decoder"):
        layers, taken = backbone[side]["layers"], []
        for kind, place in layer_runs(config, side):
            for i in range(place.start, place.stop):
                weights_E = next(routed) if kind == "routed" else np.ones(1)
                taken.append(_mean(layers[kind], i, weights_E))
        stacked = jax.tree.map(lambda *p: np.stack(p)[:, None], *taken)
        result[side] = {**backbone[side], "layers": {"routed": stacked}}
    return result


def _mean(layers: Params, layer: int, weights_E: np.ndarray) -> Params:
    if weights_E.max() >= _ONE:
        return jax.tree.map(lambda p: p[layer, weights_E.argmax()], layers)
    return jax.tree.map(lambda p: np.tensordot(weights_E.astype(p.dtype), p[layer], 1), layers)


def _error(
    run: Run, route_NxE: np.ndarray, dense: ModelConfig, plain: Params, own: Vocabulary
) -> str:
    """Describes the difference between the logits of the plain model and of the mixture."""
    rng = np.random.default_rng(0)
    inputs, targets = rng.integers(0, own.size, (2, *_PROBE), dtype=np.int32)
    targets[:, 0] = own.decoder_start_id
    ones, positions = np.ones(_PROBE, np.int32), np.broadcast_to(np.arange(_PROBE[1]), _PROBE)
    batch = {"inputs": inputs, "decoder_inputs": targets}
    batch |= {"input_segments": ones, "target_segments": ones}
    batch |= {"input_positions": positions, "target_positions": positions}

    def logits(config, params, weights) -> np.ndarray:
        apply = jax.jit(EncoderDecoder(config).apply)
        return np.asarray(apply({"params": params}, batch, weights))

    mixed = logits(run.model.config, run.params["backbone"], jnp.asarray(route_NxE))
    ours = logits(dense, plain, None)
    agree = np.mean(mixed.argmax(-1) == ours.argmax(-1))
    return (
        f"its logits differ from the mixture's by {np.abs(mixed - ours).max():.3g} at most and"
        f" {np.abs(mixed - ours).mean():.3g} on average, and the most likely token is the same at"
        f" {agree:.1%} of positions ({_PROBE[0]} x {_PROBE[1]} random tokens)"
    )
