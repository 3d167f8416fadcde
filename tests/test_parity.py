"""Numeric parity with the published PyTorch code: routes, logits, loss, gradients, decoding."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest
from conftest import TABLES

from moe_jax.core.sharding import MeshConfig, make_mesh
from moe_jax.data.batch import INPUTS
from moe_jax.decoding.rows import RowModel, row_routes
from moe_jax.decoding.search import DecodingConfig, DecodingIds, decode
from moe_jax.model.backbone import EncoderDecoder
from moe_jax.model.config import ModelConfig, RouterConfig
from moe_jax.model.experts import gather, scatter_add
from moe_jax.model.selection import select
from moe_jax.model.task_moe import Assignment, TaskMoE
from moe_jax.training.loss import token_losses
from moe_jax.training.step import StepConfig, gradients

FAMILIES = ("linear", "rnn", "lstm", "gru", "transformer")
KINDS = [f"{family}{form}" for form in ("", "_layer_specific") for family in FAMILIES]
PAD, EOS = 1, 2
ABSOLUTE, LOSS, GRADIENT = 1e-5, 1e-6, 1e-4  # bars: absolute, relative, relative
TAUS = (1.0, 0.1, 5.0)


class Table:
    """The worst difference of every quantity and router; fails at once if one exceeds its limit."""

    def __init__(self):
        self.rows = {}

    def check(self, quantity: str, kind: str, difference: float, bar: float) -> None:
        self.rows.setdefault((quantity, bar), {}).setdefault(kind, 0.0)
        row = self.rows[quantity, bar]
        row[kind] = max(row[kind], float(difference))
        assert difference <= bar, f"{quantity} of {kind}: {difference:.2e} > {bar:.0e}"

    def absolute(self, quantity, kind, ours, theirs, where=None):
        difference = np.abs(np.asarray(ours) - theirs)
        self.check(
            quantity, kind, np.max(difference if where is None else difference[where]), ABSOLUTE
        )

    def relative(self, quantity, kind, ours, theirs, bar):
        """Largest difference over the largest entry."""
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        self.check(quantity, kind, np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs)), bar)

    def __str__(self):
        lines = [f"{'parity with the published code':52} {'worst':>8} {'bar':>6}  where"]
        for (quantity, bar), row in self.rows.items():
            kind, worst = max(row.items(), key=lambda item: item[1])
            lines.append(f"{quantity:52} {worst:8.1e} {bar:6.0e}  {kind} (of {len(row)})")
        return "\n".join(lines)


@pytest.fixture(scope="module")
def table(request):
    table = Table()
    yield table
    request.config.stash[TABLES].append(str(table))


class Fixture:
    """Inputs and backbone, shared by all files, and each file's arrays."""

    def __init__(self, directory):
        self.directory = directory
        arrays = self.load("backbone")
        config = json.loads(str(arrays["config"]))
        self.published = _params(arrays)
        self.shape = {
            "vocabulary_size": config["vocab_size"],
            "d_model": config["d_model"],
            "d_ff": config["encoder_ffn_dim"],
            "heads": config["encoder_attention_heads"],
            "encoder_layers": config["encoder_layers"],
            "decoder_layers": config["decoder_layers"],
            "max_positions": config["max_position_embeddings"],
            "dropout_rate": 0.0,
        }
        self.config = ModelConfig(**self.shape, experts=config["router_block_num"])
        self.router = {
            "hidden_dim": config["router_hidden_dim"],
            "representation_dim": config["router_input_dim"],
        }
        self.layers = len(self.config.routed_layers)
        self.backbone = published.backbone(self.published, self.config)
        self.tasks = jnp.asarray(arrays["in/task_embed"])
        labels = arrays["in/labels"].astype(np.int32)
        inputs = arrays["in/input_ids"].astype(np.int32)
        segments = arrays["in/attention_mask"].astype(np.int32)
        self.real_input, self.real = segments > 0, labels != PAD
        self.batch = {
            "inputs": inputs,
            "input_segments": segments,
            "input_positions": np.broadcast_to(np.arange(inputs.shape[1]), inputs.shape),
            "decoder_inputs": arrays["in/decoder_input_ids"].astype(np.int32),
            "targets": labels,
            "target_segments": self.real.astype(np.int32),
            "target_positions": np.broadcast_to(np.arange(labels.shape[1]), labels.shape),
        }
        # One task per example: groups of one row, [G, 1, L].
        self.batch = {k: jnp.asarray(v[:, None]) for k, v in self.batch.items()}

    @functools.cache  # noqa: B019
    def load(self, name):
        with np.load(self.directory / f"{name}.npz") as file:
            return dict(file)

    def both(self, arrays, name):
        """Encoder and decoder part of [layers, T, E] arrays -> [T, N, E]."""
        return np.concatenate([arrays[name.format(s)] for s in ("enc", "dec")]).swapaxes(0, 1)

    @functools.cache  # noqa: B019
    def runner(self, experts, config=None, with_gradients=False):
        """Jitted `(backbone, weights_GxNxK, index_GxNxK, batch) -> dict` of all groups."""
        module = EncoderDecoder(config or self.config)

        def one(params, weights_NxK, group):
            bound = module.bind({"params": params})
            source, segments = group["inputs"], group["input_segments"]
            encoded = bound.encode(source, segments, group["input_positions"], weights_NxK)
            target = [group[k] for k in ("decoder_inputs", "target_segments", "target_positions")]
            logits = bound.logits(bound.decode(encoded, segments, *target, weights_NxK))
            losses = token_losses(logits, group["targets"], 0.1)
            loss = jnp.sum(losses, where=group["target_segments"] > 0)
            return loss, {"logits": logits[0], "encoded": encoded[0]}

        def run(backbone, weights, index, batch):
            params = backbone if index is None else jax.vmap(gather, (None, 0))(backbone, index)
            axes = (None if index is None else 0, None if weights is None else 0, 0)

            def total_loss(params, weights):
                losses, out = jax.vmap(one, axes)(params, weights, batch)
                return jnp.sum(losses), {**out, "loss": jnp.sum(losses)}

            if not with_gradients:
                return total_loss(params, weights)[1]
            (by_params, by_weights), out = jax.grad(total_loss, (0, 1), has_aux=True)(
                params, weights
            )
            if index is not None:
                zeros = jax.tree.map(jnp.zeros_like, backbone)
                by_params, _ = jax.lax.scan(
                    lambda total, group: (scatter_add(total, *group), None),
                    zeros,
                    (by_params, index),
                )
            return {**out, "backbone": by_params, "weights": by_weights}

        return jax.jit(run)

    @functools.cached_property
    def unmap(self):
        """Gradients of our backbone -> gradients under the published names and shapes."""
        transpose = jax.linear_transpose(
            lambda p: published.backbone(p, self.config), self.published
        )
        return jax.jit(lambda backbone: transpose(backbone)[0])


def _params(arrays):
    return {k[6:]: jnp.asarray(v) for k, v in arrays.items() if k.startswith("param/")}


@pytest.fixture(scope="module")
def fixture(fixtures):
    return Fixture(fixtures)


SELECTIONS = {
    **{f"softmax {tau:g}": ("softmax", tau, {}) for tau in TAUS},
    "gumbel_softmax": ("gumbel_softmax", None, {}),
    "gumbel_softmax_st": ("gumbel_softmax_st", None, {}),
    "argmax": ("argmax", 1.0, {}),
    "top_k": ("top_k", 1.0, {"experts_per_layer": 2}),
}


def routes_of(fixture, kind, tau, params, tasks, gumbel):
    """Logits and routes of every selection from published weights: {name: [T, N, E]}."""
    model = TaskMoE(fixture.config, RouterConfig(kind=kind, **fixture.router), 4)
    logits = model.new_router().apply(
        {"params": published.router(params, kind, model.layers)}, tasks
    )
    routes = {"logits": logits}
    for name, (selection, temperature, options) in SELECTIONS.items():
        config = RouterConfig(selection=selection, **options)
        routes[name] = select(
            logits,
            config,
            temperature=temperature or tau,
            gumbel_TxNxE=gumbel if selection.startswith("gumbel") else None,
        )
    return routes


@pytest.mark.parametrize("kind", KINDS)
def test_router(kind, fixture, table):
    arrays = fixture.load(f"router_{kind}")
    params = _params(arrays)
    gumbel = jnp.asarray(fixture.both(arrays, "in/gumbel_{}"))
    function = functools.partial(routes_of, fixture, kind, float(arrays["in/gumbel_tau"]))
    routes = jax.jit(function)(params, fixture.tasks, gumbel)

    @jax.jit
    def pull_back(cotangents):
        return jax.vjp(lambda p, t: function(p, t, gumbel), params, fixture.tasks)[1](cotangents)

    def routing_gradients(name, weight_grads):
        """Gradients of published router weights and task vectors, given those of the routes."""
        zeros = {k: jnp.zeros_like(v) for k, v in routes.items()}
        return pull_back({**zeros, name: weight_grads})

    # Routes.
    theirs = fixture.both(arrays, "out/{}_route_logits")
    table.absolute("route logits", kind, routes["logits"], theirs)
    for tau in TAUS:
        theirs = fixture.both(arrays, f"out/{{}}_routes_tau{tau:g}")
        table.absolute(f"routes, temperature {tau:g}", kind, routes[f"softmax {tau:g}"], theirs)

    # All experts: logits, loss and every gradient.
    run = fixture.runner(3, with_gradients=True)
    out = run(fixture.backbone, routes["softmax 1"], None, fixture.batch)
    table.absolute("logits", kind, out["logits"], arrays["out/logits"], fixture.real)
    theirs = arrays["out/encoder_last_hidden_state"]
    table.absolute("encoder states", kind, out["encoded"], theirs, fixture.real_input)
    table.relative("loss", kind, out["loss"], arrays["out/loss"], LOSS)
    by_name, by_task = routing_gradients("softmax 1", out["weights"])
    table.relative("gradient of task vectors", kind, by_task, arrays["grad/task_embed"], GRADIENT)
    for name, grad in by_name.items():
        # The key's bias shifts all scores of a query equally, so its true gradient is zero.
        theirs = arrays[f"grad/{name}"]
        if name.endswith("in_proj_bias"):
            grad, theirs = (
                np.delete(g, np.s_[len(g) // 3 : 2 * len(g) // 3]) for g in (grad, theirs)
            )
        table.relative("gradient of router weights", kind, grad, theirs, GRADIENT)
    check_norms(fixture, table, kind, arrays, out["backbone"], by_name, by_task)

    # Gumbel selections with the published run's noise.
    for name in ("gumbel_softmax", "gumbel_softmax_st"):
        out = run(fixture.backbone, routes[name], None, fixture.batch)
        table.relative(f"loss, {name}", kind, out["loss"], arrays[f"out/loss_{name}"], LOSS)
        _, by_task = routing_gradients(name, out["weights"])
        theirs = arrays[f"grad/task_embed_{name}"]
        table.relative(f"gradient of task vectors, {name}", kind, by_task, theirs, GRADIENT)

    # One expert per layer, for the route of task 0.
    hard = jnp.repeat(jax.nn.one_hot(jnp.argmax(routes["softmax 1"][:1], -1), 3), 4, axis=0)
    out = run(fixture.backbone, hard, None, fixture.batch)
    theirs = arrays["out/logits_sparse"]
    table.absolute("logits, one-hot over all experts", kind, out["logits"], theirs, fixture.real)
    index, weights = assign(fixture, hard, 1)
    gathered = fixture.runner(1, with_gradients=True)
    out = gathered(fixture.backbone, weights, index, fixture.batch)
    table.absolute("logits, 1 of 3 gathered", kind, out["logits"], theirs, fixture.real)

    # Gathered against all experts, where the selection leaves experts out.
    for name, k in (("gumbel_softmax_st", 1), ("argmax", 1), ("top_k", 2)):
        dense = run(fixture.backbone, routes[name], None, fixture.batch)
        index, weights = assign(fixture, routes[name], k)
        gathered = fixture.runner(k, with_gradients=k == 1)
        sparse = gathered(fixture.backbone, weights, index, fixture.batch)
        label = f"{name}, {k} of 3 gathered:"
        table.absolute(f"{label} logits", kind, sparse["logits"], dense["logits"], fixture.real)
        table.relative(f"{label} loss", kind, sparse["loss"], dense["loss"], LOSS)
        if k == 1:
            chosen = jnp.take_along_axis(dense["weights"], index, -1)
            table.relative(f"{label} gradient of routes", kind, sparse["weights"], chosen, GRADIENT)
            difference = jax.tree.map(jnp.subtract, sparse["backbone"], dense["backbone"])
            share = norm_of(difference) / norm_of(dense["backbone"])
            table.check(f"{label} gradient of weights", kind, share, GRADIENT)


def norm_of(tree) -> float:
    return float(np.sqrt(sum(np.sum(np.square(np.asarray(a))) for a in jax.tree.leaves(tree))))


def assign(fixture, routes, k) -> Assignment:
    """The experts that the training step gathers for these routes."""
    config = RouterConfig(selection="top_k", experts_per_layer=k)
    return TaskMoE(fixture.config, config, 4).assign(routes, jnp.arange(4))


def check_norms(fixture, table, kind, arrays, backbone, by_name, by_task):
    """Gradient norms of every weight, under the published names and shapes."""
    grads = {**fixture.unmap(backbone), **by_name}
    total = float(arrays["grad_norm/total_with_task_embed"])
    for name, theirs in zip(arrays["grad_norm/names"], arrays["grad_norm/values"], strict=True):
        ours = norm_of(grads[str(name)])
        if name.endswith("k_proj.bias"):  # zero up to rounding, see above
            assert max(ours, theirs) < 1e-6 * total
        else:
            table.relative("gradient norms of all weights", kind, ours, theirs, GRADIENT)
    ours = norm_of((grads, by_task))
    table.relative("gradient norm", kind, ours, total, GRADIENT)


def test_training_step_gradients(fixture, table):
    """The gradient of the training step: groups over 2 devices, scanned, mean over target
    tokens."""
    arrays = fixture.load("router_linear")
    model = TaskMoE(fixture.config, RouterConfig(kind="linear", **fixture.router), 4)
    params = {
        "backbone": fixture.backbone,
        "router": published.router(_params(arrays), "linear", fixture.layers),
        "representations": fixture.tasks,
    }
    mesh = make_mesh(MeshConfig(), jax.devices()[:2])
    step = jax.jit(functools.partial(gradients, model, config=StepConfig(), mesh=mesh))
    batch = {**fixture.batch, "task_id": jnp.arange(4)}
    grads, metrics, _ = step(params, batch, step=jnp.int32(0), key=jax.random.key(0))
    tokens = int(arrays["out/n_target_tokens"])
    assert metrics["target_tokens"] == tokens
    label = "training step"
    table.relative(f"{label}: loss", "linear", tokens * metrics["loss"], arrays["out/loss"], LOSS)
    ours, theirs = tokens * grads["representations"], arrays["grad/task_embed"]
    table.relative(f"{label}: gradient of task vectors", "linear", ours, theirs, GRADIENT)
    ours, theirs = tokens * norm_of(grads), arrays["grad_norm/total_with_task_embed"]
    table.relative(f"{label}: gradient norm", "linear", ours, theirs, GRADIENT)


def test_dense(fixture, table):
    arrays = fixture.load("dense")
    config = ModelConfig(**fixture.shape)
    backbone = published.backbone(fixture.published, config)
    out = fixture.runner(1, config)(backbone, None, None, fixture.batch)
    table.absolute("logits, dense", "dense", out["logits"], arrays["out/logits"], fixture.real)
    table.relative("loss, dense", "dense", out["loss"], arrays["out/loss"], LOSS)


def test_vanilla_layers(fixture, table):
    arrays = fixture.load("vanilla")
    config = ModelConfig(
        **fixture.shape, experts=3, encoder_vanilla_layers=(0,), decoder_vanilla_layers=(0,)
    )
    backbone = published.backbone(fixture.published, config)
    # The published router still has outputs for layers that are not routed.
    routes = routes_of(fixture, "linear", 1.0, _params(arrays), fixture.tasks, None)["softmax 1"]
    run = fixture.runner(3, config)
    out = run(backbone, routes[:, jnp.array([1, 3])], None, fixture.batch)
    table.absolute("logits, vanilla", "vanilla", out["logits"], arrays["out/logits"], fixture.real)
    table.relative("loss, vanilla", "vanilla", out["loss"], arrays["out/loss"], LOSS)


@pytest.mark.parametrize("beams", [1, 4])
def test_decoding(beams, fixture):
    """Start token 0, 12 tokens in all with the start; the published code forces EOS at the end.

    It decodes the whole batch with the route of its first row (a fault), so all rows use that
    route.
    """
    config = DecodingConfig(num_beams=beams, forced_eos_id=EOS)
    batch = {name: fixture.batch[name][:, 0] for name in INPUTS}
    rows = jnp.arange(len(batch["inputs"]))

    @jax.jit
    def tokens(routes):
        return decode(
            RowModel(model, fixture.backbone, routes), batch, rows,
            length=11, config=config, ids=DecodingIds(0, EOS, PAD),
        )  # fmt: skip

    for kind in ("linear", "linear_layer_specific"):
        arrays = fixture.load(f"router_{kind}")
        dense = fixture.both(arrays, "out/{}_routes_tau1")[:1].repeat(len(rows), 0)
        onehot = np.eye(3)[np.argmax(dense, -1)]
        for name, routes, used in (
            ("dense", dense, 3),
            ("onehot", onehot, 1),
            ("onehot", onehot, 3),
        ):
            model = TaskMoE(fixture.config, RouterConfig(kind=kind, **fixture.router), 4)
            ours = np.pad(tokens(row_routes(routes, np.asarray(rows), used)), ((0, 0), (1, 0)))
            np.testing.assert_array_equal(ours, arrays[f"out/generate_{name}_beam{beams}"])
