"""Checkpoints: which are kept, restoring, and errors for damaged or foreign ones."""

import itertools
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_run import tiny_model, tiny_params

from moe_jax.core.errors import UserError
from moe_jax.training.checkpoints import (
    Checkpoints,
    fit_backbone,
    fit_table,
    load_params,
    merge_heads,
)
from moe_jax.training.optimizer import OptimizerConfig, make_optimizer
from moe_jax.training.step import TrainState, init_state

META = {"tasks": ["a", "b"], "data": "fingerprint", "iterator": {"next_index": 7}}
OPTIMIZER = make_optimizer(OptimizerConfig(frozen=("router",)))


def state(step=0, seed=0, experts=2, width=3) -> TrainState:
    """A small tree with the names of a model's."""
    rng = np.random.default_rng(seed)

    def layers(depth):
        return {"layers": {"routed": {"kernel": rng.normal(size=(depth, experts, width, 4))}}}

    params = {
        "backbone": {
            "embedding": rng.normal(size=(8, width)),
            "encoder": layers(1),
            "decoder": layers(2),
        },
        "router": {"hidden": {"kernel": rng.normal(size=(2, 2))}},
        "representations": rng.normal(size=(2, 2)),
    }
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    return init_state(params, OPTIMIZER).replace(step=jnp.int32(step))


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    return all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def saved(directory, steps=(5,), scores=(), keep=1):
    checkpoints = Checkpoints(directory, keep)
    for step, score in itertools.zip_longest(steps, scores):
        checkpoints.save(state(step, seed=step), META, score)
    checkpoints.wait()
    return checkpoints


def kept(directory):
    return {int(p.name) for p in (directory / "checkpoints").iterdir()}


def test_a_state_comes_back_bit_by_bit(tmp_path):
    saved(tmp_path, [5])
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest() == 5
    found, meta = checkpoints.restore(5, state(0, seed=1))
    assert same(found, state(5, seed=5))
    assert {name: meta[name] for name in META} == META
    params, meta = load_params(tmp_path)
    assert same(params, state(5, seed=5).params) and meta["step"] == 5


def test_a_new_directory_has_no_checkpoint(tmp_path):
    assert Checkpoints(tmp_path).latest() is None
    with pytest.raises(UserError, match=f"no checkpoint in {tmp_path}"):
        load_params(tmp_path)


def test_the_latest_and_the_best_are_kept(tmp_path):
    saved(tmp_path / "a", [1, 2, 3, 4, 5], [0.1, 0.9, None, 0.3, 0.2])
    assert kept(tmp_path / "a") == {2, 5}
    saved(tmp_path / "b", [1, 2, 3, 4], [0.1, 0.9, 0.2, 0.3], keep=2)
    assert kept(tmp_path / "b") == {2, 3, 4}
    saved(tmp_path / "c", [1, 2, 3])
    assert kept(tmp_path / "c") == {3}
    for path in (tmp_path / "a" / "checkpoints" / "2", tmp_path / "a"):
        step = 2 if path.name == "2" else 5
        assert same(load_params(path)[0], state(seed=step).params)
    assert same(load_params(tmp_path / "a", step=2)[0], state(seed=2).params)


def test_the_first_parameter_of_another_shape_is_named(tmp_path):
    checkpoints = saved(tmp_path)
    with pytest.raises(UserError, match=(
        r"checkpoints: backbone/decoder/layers/routed/kernel has shape \[2, 2, 3, 4\], "
        r"the model needs shape \[2, 3, 3, 4\]"
    )):  # fmt: skip
        checkpoints.restore(5, state(experts=3))
    larger = state()
    larger.params["backbone"]["a_new_one"] = jnp.zeros(2)
    with pytest.raises(UserError, match=r"backbone/a_new_one is absent, .* needs shape \[2\]"):
        checkpoints.restore(5, larger)
    smaller = state()
    del smaller.params["backbone"]["embedding"]
    with pytest.raises(UserError, match=r"backbone/embedding .* the model has no such parameter"):
        checkpoints.restore(5, smaller)


def read_damaged(directory: Path, damage: str) -> None:
    """Damages every file of a checkpoint in turn. Reading gives a UserError or the saved values."""
    saved(directory / "good")
    step = directory / "good" / "checkpoints" / "5"
    files = sorted(p.relative_to(step) for p in step.rglob("*") if p.is_file())
    errors = 0
    for name in files:
        copy = directory / "damaged"
        shutil.copytree(directory / "good", copy)
        path = copy / "checkpoints" / "5" / name
        content = path.read_bytes()
        if damage == "gone":
            path.unlink()
        else:
            path.write_bytes(content[: len(content) // 2] if damage == "truncated" else
                             bytes(255 - b for b in content))  # fmt: skip
        for read in (
            lambda: Checkpoints(copy).restore(5, state())[0].params,  # noqa: B023
            lambda: load_params(copy)[0],  # noqa: B023
        ):
            try:
                assert same(read(), state(seed=5).params), (name, damage)
            except UserError as e:
                assert "cannot restore" in str(e) and "\n" not in str(e)
                errors += 1
        shutil.rmtree(copy)
    assert errors > 5  # most of the files that both readers read


@pytest.mark.parametrize("damage", [
    "truncated",
    pytest.param("garbage", marks=pytest.mark.slow),
    pytest.param("gone", marks=pytest.mark.slow),
])  # fmt: skip
def test_a_damaged_file_is_an_error_in_one_line_or_harmless(damage, tmp_path):
    """Runs in its own process, because Orbax leaves coroutines that warn when they are
    collected."""
    program = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_checkpoints import Path, read_damaged\n"
        f"read_damaged(Path({str(tmp_path)!r}), {damage!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


# Runs in its own process, because threads of a failed save keep running for a while.
FAILING = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_checkpoints import META, Checkpoints, UserError, state
from moe_jax.runs import flags
checkpoints = Checkpoints(Path(sys.argv[2]))
resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.RLIM_INFINITY))
try:
    checkpoints.save(state(6), META, None)
    checkpoints.wait()
except UserError as e:
    flags.fail(e)
"""


def test_a_write_that_fails_is_one_line_and_leaves_the_last_checkpoint(tmp_path):
    """A full disk, simulated by a limit on file sizes."""
    saved(tmp_path)
    command = [sys.executable, "-c", FAILING, str(Path(__file__).parent), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    # Only the last line is checked, because a thread of Orbax sometimes prints a warning before.
    error = f"error: cannot save to {tmp_path}/checkpoints: File too large"
    assert done.stderr.splitlines()[-1] == error
    again = Checkpoints(tmp_path)
    assert again.latest() == 5
    assert same(again.restore(5, state())[0], state(5, seed=5))
    again.save(state(6, seed=6), META, None)
    again.wait()
    assert kept(tmp_path) == {6}


def test_what_a_killed_run_was_writing_is_cleared_away(tmp_path):
    saved(tmp_path)
    shutil.copytree(tmp_path / "checkpoints" / "5", tmp_path / "left")
    (tmp_path / "left").rename(tmp_path / "checkpoints" / "6.orbax-checkpoint-tmp")
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest() == 5
    checkpoints.save(state(6, seed=6), META, None)
    checkpoints.wait()
    assert kept(tmp_path) == {6}
    assert same(load_params(tmp_path)[0], state(seed=6).params)


# ------------------------------------------------------------------------------ starting points


def test_one_expert_fills_all_and_noise_tells_them_apart():
    dense, like = state(experts=1, seed=3).params["backbone"], state().params["backbone"]
    plain = fit_backbone(dense, like, 0.0, jax.random.key(0), "here")
    noisy = fit_backbone(dense, like, 0.01, jax.random.key(0), "here")
    for side in ("encoder", "decoder"):
        (one, copies, apart) = (
            np.asarray(b[side]["layers"]["routed"]["kernel"]) for b in (dense, plain, noisy)
        )
        np.testing.assert_array_equal(copies, np.repeat(one, 2, axis=1))
        noise = apart - copies
        assert 0.003 < noise.std() < 0.03 and not np.array_equal(noise[:, 0], noise[:, 1])
    np.testing.assert_array_equal(noisy["embedding"], dense["embedding"])


def test_as_many_experts_are_taken_as_they_are():
    backbone, like = state(seed=3).params["backbone"], state().params["backbone"]
    assert same(fit_backbone(backbone, like, 0.5, jax.random.key(0), "here"), backbone)


@pytest.mark.parametrize("other", [{"experts": 3}, {"width": 5}])
def test_another_architecture_is_refused(other):
    with pytest.raises(
        UserError, match=r"^here: (de|en)coder/layers/.* the model needs shape|^here: embedding "
    ):
        fit_backbone(
            state(**other).params["backbone"], state().params["backbone"], 0.0,
            jax.random.key(0), "here",
        )  # fmt: skip


def test_the_table_is_matched_by_task_name():
    params = state(seed=3).params
    found = fit_table(params, state().params, ["b", "a"], ["a", "b"], "here")
    table = np.asarray(params["representations"])
    np.testing.assert_array_equal(found["representations"], table[::-1])
    with pytest.raises(UserError, match="here: its task table has no 'c'"):
        fit_table(params, state().params, ["b", "a"], ["a", "c"], "here")


def test_heads_apart_are_merged():
    """The layout of checkpoints before heads and head width became one axis."""
    model = tiny_model(experts=2, heads=2)
    params = tiny_params(model)
    heads, dim = model.config.heads, model.config.head_dim

    def apart(path, p):
        block, name = path[-2].key if len(path) > 1 else "", path[-1].key
        if not block.endswith("_attention") or name == "out_bias":
            return p
        if name == "out_kernel":
            return p.reshape(*p.shape[:2], heads, dim, -1)
        return p.reshape(*p.shape[:-1], heads, dim)

    before = jax.tree_util.tree_map_with_path(apart, params)
    kernel = before["backbone"]["encoder"]["layers"]["routed"]["self_attention"]["qkv_kernel"]
    assert kernel.shape == (1, 2, 16, 3, 2, 8)
    jax.tree.map(np.testing.assert_array_equal, merge_heads(before), params)
    jax.tree.map(np.testing.assert_array_equal, merge_heads(params), params)
