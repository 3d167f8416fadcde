"""The model that T5X drives, without T5X: rows of several tasks in one batch, data, refusals."""

import dataclasses
from functools import partial
from types import SimpleNamespace

import gin
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import core, traverse_util
from toy import NAMES, TASKS, VOCABULARY, toy_cache, toy_mixtures

from moe_jax.core.errors import UserError
from moe_jax.core.sharding import MeshConfig, make_mesh
from moe_jax.data import packing
from moe_jax.data.pipeline import eval_batches, train_batches
from moe_jax.data.registry import load_task_modules, seqio
from moe_jax.decoding.search import DecodingConfig
from moe_jax.evaluation.evaluator import Evaluator
from moe_jax.interop import t5x
from moe_jax.interop.streamed_checkpoint import Promise, save_params
from moe_jax.interop.t5x_data import GROUP_TASK_ID, TASK_ID
from moe_jax.interop.t5x_data import NAMES as FEATURES
from moe_jax.interop.t5x_read import from_t5x
from moe_jax.interop.t5x_run import write_run
from moe_jax.model.config import ModelConfig, RouterConfig
from moe_jax.model.task_moe import parameter_shapes, routes_of
from moe_jax.runs import directory
from moe_jax.runs.config import Config, DataConfig, RunConfig
from moe_jax.runs.mixtures import run_vocabulary
from moe_jax.training.checkpoints import load_params
from moe_jax.training.optimizer import OptimizerConfig, apply, make_optimizer, schedule
from moe_jax.training.step import StepConfig

LENGTHS = {"inputs": 6, "targets": 5}  # some examples are longer
ROWS = 8
STEP = 5
CONFIG = Config(
    RunConfig(seed=3),
    DataConfig(NAMES[0], (TASKS,), LENGTHS, vocabulary=VOCABULARY, batch_size=16, rows_per_group=2),
    ModelConfig(
        d_model=16, d_ff=32, heads=2, encoder_layers=1, decoder_layers=1, max_positions=48,
        init_std=0.5, dropout_rate=0.0, experts=4, expert_noise=0.5,
    ),
    RouterConfig(
        hidden_dim=8, representation_dim=8, selection="argmax", experts_per_layer=1,
    ),
    step=StepConfig(label_smoothing=0.0),
    decoding=DecodingConfig(min_length=4),
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def registries():
    """Other tests see the toy tasks as they were registered."""
    load_task_modules((TASKS,))  # which registers them once in a process
    with pytest.MonkeyPatch.context() as patch:
        for registry in (seqio.TaskRegistry, seqio.MixtureRegistry):
            patch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
        # As other modules may have it: of tasks in the task table, and of others.
        seqio.MixtureRegistry.add("known_and_new", [*NAMES], default_rate=1.0)
        yield


def made(**changes) -> t5x.TaskMoEModel:
    config = dataclasses.replace(CONFIG, **changes)
    data = dataclasses.replace(config.data, cache_dir=str(toy_cache()))
    return t5x.TaskMoEModel(dataclasses.replace(config, data=data), optimizer_def=None)


@pytest.fixture(scope="module")
def model():
    return made()


@pytest.fixture(scope="module")
def variables(model):
    return model.get_initial_variables(None, {"encoder_input_tokens": (ROWS, LENGTHS["inputs"])})


CLOCK = core.freeze({"clock": {"step": jnp.int32(STEP)}})


def converted(model, name: str, split: str = "test") -> list[dict[str, np.ndarray]]:
    """SeqIO's examples as T5X's `infer.py` and evaluator read them."""
    source = seqio.get_mixture_or_task(name)
    data = source.get_dataset(LENGTHS, split=split, shuffle=False, num_epochs=1)
    return list(model.FEATURE_CONVERTER_CLS(pack=False)(data, LENGTHS).as_numpy_iterator())


@pytest.fixture(scope="module")
def mixed(model) -> dict[str, np.ndarray]:
    """Rows of both tasks in turn."""
    rows = [converted(model, name)[: ROWS // 2] for name in model.tasks]
    rows = [row for pair in zip(*rows, strict=True) for row in pair]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


# ---- data ----


def test_rows_are_laid_out_as_in_moe_jax(model):
    mixture, _ = toy_mixtures()
    for task_id, name in enumerate(mixture.names):
        rows = converted(model, name)
        batch, _ = next(eval_batches(mixture, name, "test", lengths=LENGTHS, rows=len(rows)))
        for theirs, ours in FEATURES.items():
            assert np.array_equal([row[theirs] for row in rows], batch[ours]), theirs
        assert {row[TASK_ID].item() for row in rows} == {task_id}
    everything = [
        len(example.inputs)
        for name in mixture.names
        for example in mixture.task(name).records("test").take(range(20))
    ]
    assert max(everything) > LENGTHS["inputs"] > min(everything)


def test_a_mixture_gives_rows_of_all_its_tasks(model):
    rows = converted(model, NAMES[0], "train")
    assert {row[TASK_ID].item() for row in rows} == set(range(len(model.tasks)))


def test_training_batches_are_those_of_train(model, tmp_path):
    gin.parse_config([f"DataConfig.{k} = {v!r}" for k, v in {
        "mixture_or_task_name": NAMES[0], "task_modules": (TASKS,), "lengths": LENGTHS,
        "cache_dir": str(toy_cache()), "batch_size": 16, "rows_per_group": 2,
    }.items()] + [f"VocabularyConfig.size = {VOCABULARY.size}", "RunConfig.seed = 3"])  # fmt: skip
    mixture, _ = toy_mixtures()
    ours = iter(train_batches(mixture, lengths=LENGTHS, groups=8, rows=2, seed=3))
    theirs = t5x.get_dataset(SimpleNamespace(batch_size=16), 0, 1, None)
    for _ in range(3):
        expected, batch = next(ours), next(theirs)
        spec = {name: (s.dtype, s.shape) for name, s in theirs.element_spec.items()}
        assert spec == {name: (array.dtype, array.shape) for name, array in batch.items()}
        for name, own in FEATURES.items():
            assert np.array_equal(batch[name].reshape(expected[own].shape), expected[own])
        assert np.array_equal(batch[GROUP_TASK_ID].reshape(8, 2).T, [expected["task_id"]] * 2)
    theirs.save(tmp_path / "position")
    following = next(theirs)
    again = t5x.get_dataset(SimpleNamespace(batch_size=16), 0, 1, None)
    again.restore(tmp_path / "position")
    jax.tree.map(np.testing.assert_array_equal, next(again), following)
    with pytest.raises(UserError, match=r"DatasetConfig\.batch_size is 8, DataConfig"):
        t5x.get_dataset(SimpleNamespace(batch_size=8), 0, 1, None)


# ---- losses and answers of mixed rows ----


def token_losses(model, params, rows: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Cross-entropy of every token, and whether it is one; by the module, each row a group."""
    batch = {ours: rows[theirs][:, None] for theirs, ours in FEATURES.items()}
    apply_model = jax.jit(lambda p, b: model.moe.apply({"params": p}, b, step=STEP))
    logits, _ = apply_model(params, batch | {"task_id": rows[TASK_ID][:, 0]})
    logits = np.asarray(logits, np.float64)[:, 0]
    targets = np.take_along_axis(logits, rows["decoder_target_tokens"][..., None], -1)[..., 0]
    real = rows["decoder_segment_ids"] > 0
    return (np.log(np.exp(logits).sum(-1)) - targets) * real, real


def test_loss_and_scores_of_mixed_rows(model, variables, mixed):
    params = core.unfreeze(variables["params"])
    losses, real = token_losses(model, params, mixed)
    routes = np.asarray(routes_of(model.moe, params, STEP))
    assert not np.array_equal(routes[0], routes[1])
    with jax.set_mesh(model.mesh):
        (loss, (metrics, after)), grads = jax.jit(jax.value_and_grad(model.loss_fn, has_aux=True))(
            variables["params"], mixed, None, CLOCK
        )
        scores = jax.jit(model.score_batch)(variables["params"], mixed, flax_mutables=CLOCK)
        eval_loss, _ = jax.jit(model.eval_fn)(variables["params"], mixed, CLOCK)
    mean = losses.sum() / real.sum()
    np.testing.assert_allclose([loss, eval_loss, metrics["loss"].compute()], mean, rtol=1e-5)
    np.testing.assert_allclose(scores, -losses.sum(-1), rtol=1e-5)
    assert after == core.freeze({"clock": {"step": jnp.int32(STEP + 1)}})
    assert jax.tree.structure(grads) == jax.tree.structure(variables["params"])
    assert np.abs(grads["representations"]).max() > 0


def test_texts_and_their_scores_are_those_of_eval(model, variables, mixed):
    vocabulary = toy_mixtures()[0].vocabulary
    params = core.unfreeze(variables["params"])
    mesh = make_mesh(MeshConfig())
    evaluator = Evaluator(model.moe, vocabulary, LENGTHS, ROWS, mesh, CONFIG.decoding)
    arrays = {ours: mixed[theirs] for theirs, ours in FEATURES.items()}
    task_id = mixed[TASK_ID][:, 0]
    routes = evaluator.routes(params, jnp.int32(STEP))
    expected = evaluator.predict(params, routes, task_id, arrays)
    tokens, aux = jax.jit(model.predict_batch_with_aux)(
        variables["params"], mixed, flax_mutables=CLOCK
    )
    texts = [vocabulary.decode(row) for row in np.asarray(tokens).tolist()]
    assert texts == expected and len(set(texts)) > 1
    assert texts == [model.output_vocabulary.decode(row) for row in np.asarray(tokens).tolist()]
    ends = [np.flatnonzero([*row, 1] == np.int32(1))[0] + 1 for row in np.asarray(tokens)]
    examples = [
        [SimpleNamespace(inputs=row[: np.count_nonzero(row)], targets=answer[:end])]
        for row, answer, end in zip(arrays["inputs"], np.asarray(tokens), ends, strict=True)
    ]
    decoded = packing.build(examples, LENGTHS, vocabulary)
    sums, _ = evaluator.log_likelihoods(params, routes, task_id, decoded)
    np.testing.assert_allclose(aux["scores"], sums, rtol=1e-5)


# ---- parameters and the optimizer ----

# The logical axes of T5X's `standard_logical_axis_rules`.
RULES = {"batch", "vocab", "embed", "mlp", "heads", "kv", "joined_kv", "relpos_buckets",
         "abspos_buckets", "length", "layers", "stack", "mlp_activations", None}  # fmt: skip


def test_axes_of_every_parameter(variables):
    params, axes = (
        traverse_util.flatten_dict(core.unfreeze(variables[name]), sep="/")
        for name in ("params", "params_axes")
    )
    assert axes.keys() == {f"{name}_axes" for name in params}
    for name, array in params.items():
        names = axes[f"{name}_axes"].names
        assert len(names) == array.ndim and RULES.issuperset(names)
    used = {name for metadata in axes.values() for name in metadata.names}
    assert used == {"embed", "heads", "mlp", "vocab", None}


def test_optimizer_is_that_of_the_step():
    config = OptimizerConfig(
        learning_rate=0.1, router_learning_rate=0.2, clip_norm=1.0, weight_decay=0.1,
        frozen=("representations",), shared_gradient=0.25,
    )  # fmt: skip
    gin.parse_config([
        "OptimizerConfig.learning_rate = 0.1", "OptimizerConfig.router_learning_rate = 0.2",
        "OptimizerConfig.clip_norm = 1.0", "OptimizerConfig.weight_decay = 0.1",
        "OptimizerConfig.frozen = ('representations',)", "RunConfig.train_steps = 7",
        "OptimizerConfig.shared_gradient = 0.25",
    ])  # fmt: skip
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    params = {"backbone": {"kernel": draw(3, 4), "bias": draw(4), "routed": {"bias": draw(2, 3)}},
              "router": {"kernel": draw(2, 3)}, "representations": draw(5, 2)}  # fmt: skip
    inner, whole = make_optimizer(config), t5x.optimizer()
    state, frozen_params = inner.init(params), core.freeze(params)
    other = whole.init(frozen_params)
    logged = t5x.learning_rate()
    for step in range(7):
        grads = jax.tree.map(lambda p: draw(*p.shape), params)
        grads["representations"] = jnp.zeros((5, 2))
        given = core.freeze(grads)
        experts = grads["backbone"]["routed"]["bias"]
        grads["backbone"]["routed"]["bias"] = 0.75 * experts + 0.25 * experts.sum(1)[:, None]
        norm = np.sqrt(sum((np.asarray(g) ** 2).sum() for g in jax.tree.leaves(grads)))
        height = schedule(config, jnp.int32(step), 7)
        with jax.numpy_dtype_promotion("standard"):
            clipped = jax.tree.map(lambda g, n=norm: g / max(n, 1.0), grads)
            directions, state = inner.update(clipped, state, params)
            rates = {part: height * rate for part, rate in config.learning_rates.items()}
            params = apply(params, directions, rates)
            updates, other = whole.update(given, other, frozen_params)
        frozen_params = jax.tree.map(jnp.add, frozen_params, updates)
        np.testing.assert_allclose(logged(jnp.int32(step)), rates["backbone"], rtol=1e-6)
    found = core.unfreeze(frozen_params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, params)
    assert np.array_equal(found["representations"], params["representations"])


# ---- checkpoints ----


def assert_same(params, expected):
    expected = traverse_util.flatten_dict(core.unfreeze(expected), sep="/")
    found = traverse_util.flatten_dict(core.unfreeze(params), sep="/")
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert np.array_equal(found[name], array), name


def test_checkpoints_go_both_ways_and_start_runs(model, variables, tmp_path):
    source, params = tmp_path / "run", core.unfreeze(variables["params"])
    promises = jax.tree.map(lambda a: Promise(a.shape, lambda: np.asarray(a)), params)
    meta = {"tasks": model.tasks, "step": STEP, "shapes": parameter_shapes(params)}
    save_params(source, STEP, promises, meta)
    directory.write_config(source, model.config)
    directory.copy_vocabulary(source, toy_mixtures()[0].vocabulary_dir)

    write_run(source, tmp_path / "t5x")
    with pytest.raises(UserError, match="exists"):
        write_run(source, tmp_path / "t5x")
    from_t5x(str(tmp_path / "t5x" / f"checkpoint_{STEP}"), tmp_path / "back")
    back, meta = load_params(tmp_path / "back")
    assert_same(back, params)
    assert (meta["step"], meta["tasks"]) == (STEP, model.tasks)
    assert run_vocabulary(tmp_path / "back") and directory.read_task_table(tmp_path / "back")

    run = RunConfig(seed=4, initial_checkpoint_path=str(source), router_checkpoint_path=str(source))
    shapes = {"encoder_input_tokens": (ROWS, LENGTHS["inputs"])}
    start = jax.jit(partial(made(run=run).get_initial_variables, None, shapes))  # as T5X does
    assert_same(start()["params"], params)

    (tmp_path / "t5x" / f"checkpoint_{STEP}").rename(tmp_path / "t5x" / "mine")
    with pytest.raises(UserError, match="mine: a TaskMoE's checkpoint of T5X is called"):
        from_t5x(str(tmp_path / "t5x" / "mine"), tmp_path / "other")


# ---- refusals ----


def test_what_t5x_cannot_do_is_refused(model, variables, mixed):
    with pytest.raises(UserError, match="pack is True, but SeqIO would pack examples of several"):
        model.FEATURE_CONVERTER_CLS(pack=True, use_custom_packing_ops=False)
    with pytest.raises(UserError, match="not in the model's task table"):
        converted(model, NAMES[1])
    with pytest.raises(UserError, match="not in the model's task table"):
        converted(model, "known_and_new")
    half = {name: array[:4] for name, array in mixed.items()}
    with pytest.raises(UserError, match=r"4 of 8 rows at a time: set Trainer\.num_microbatches"):
        model.loss_fn(variables["params"], half, None, CLOCK)
    with pytest.raises(UserError, match=r"OptimizerConfig\.lazy is for moe_jax\.train"):
        made(optimizer=OptimizerConfig(lazy=True))
    with pytest.raises(UserError, match=r"MeshConfig\.fsdp is 8 and expert 1: inside T5X"):
        made(mesh=MeshConfig(fsdp=8))
    small = made()
    small.get_initial_variables(None, {"encoder_input_tokens": (4, LENGTHS["inputs"])})
    with pytest.raises(UserError, match="4 groups of 1 rows: not a multiple of the mesh's 8 data"):
        small.loss_fn(variables["params"], half, None, CLOCK)


@pytest.mark.parametrize(("parts", "model", "shape"), [
    (1, 1, (8, 1, 1, 1)), (2, 1, (4, 1, 1, 2)), (1, 2, (4, 1, 1, 2)), (4, 4, (2, 1, 1, 4)),
])  # fmt: skip
def test_the_mesh_of_the_partitioner(parts, model, shape):
    gin.parse_config(f"MeshConfig.model = {model}")
    partitioner = SimpleNamespace(_num_partitions=parts, _ici_mesh_shape=None)
    assert t5x.over_mesh(partitioner) is partitioner
    assert tuple(partitioner.mesh.shape.values()) == shape


@pytest.mark.parametrize(("settings", "message"), [
    ({"_num_partitions": 2}, "num_partitions is 2, MeshConfig.model 4: set one of them"),
    ({"_num_partitions": None}, "set PjitPartitioner.num_partitions"),
    ({"_ici_mesh_shape": (1, 8, 1)}, "set PjitPartitioner.num_partitions"),
])  # fmt: skip
def test_other_meshes_are_refused(settings, message):
    gin.parse_config("MeshConfig.model = 4")
    partitioner = SimpleNamespace(**{"_num_partitions": 1, "_ici_mesh_shape": None, **settings})
    with pytest.raises(UserError, match=message):
        t5x.over_mesh(partitioner)
