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
from conftest import TABLES
from jax.sharding import SingleDeviceSharding
from toy_run import tiny_model, tiny_params

from moe_jax.core.errors import UserError
from moe_jax.interop.streamed_checkpoint import Promise, save_params
from moe_jax.model.task_moe import parameter_shapes
from moe_jax.runs import directory
from moe_jax.runs.config import Config, DataConfig, RunConfig
from moe_jax.runs.initial import initial_params
from moe_jax.training.checkpoints import Checkpoints, load_params
from moe_jax.training.optimizer import OptimizerConfig, make_optimizer
from moe_jax.training.shapes import fit_backbone, fit_table
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
        checkpoints.save(state(step, seed=step), META)
        if score is not None:
            checkpoints.scores[step] = score
    checkpoints.wait()
    return checkpoints


def kept(directory):
    return {int(p.name) for p in (directory / "checkpoints").iterdir()}


def test_a_state_comes_back_bit_by_bit(tmp_path):
    saved(tmp_path, [5])
    checkpoints = Checkpoints(tmp_path)
    found, meta = checkpoints.restore(5, state(0, seed=1))
    assert same(found, state(5, seed=5))
    assert {name: meta[name] for name in META} == META
    params, meta = load_params(tmp_path)
    assert same(params, state(5, seed=5).params) and meta["step"] == 5


def test_a_new_directory_has_no_checkpoint(tmp_path):
    assert Checkpoints(tmp_path).restore_latest(state()) is None
    with pytest.raises(UserError, match=f"no checkpoint in {tmp_path}$"):
        load_params(tmp_path)
    with pytest.raises(UserError, match=r"no checkpoint in .*/nowhere: there is no such directory"):
        load_params(tmp_path / "nowhere")


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


def test_the_first_parameter_of_another_shape_is_named(tmp_path):
    checkpoints = saved(tmp_path)
    with pytest.raises(UserError, match=(
        r"checkpoints: backbone/decoder/layers/routed/kernel has shape \[2, 2, 3, 4\], "
        r"the model needs shape \[2, 3, 3, 4\]"
    )):  # fmt: skip
        checkpoints.restore(5, state(experts=3))

    def check(meta):
        raise UserError(f"step {meta['step']} has other tasks")

    with pytest.raises(UserError, match="step 5 has other tasks"):  # in place of its shape
        checkpoints.restore(5, state(experts=3), check)
    larger = state()
    larger.params["backbone"]["a_new_one"] = jnp.zeros(2)
    with pytest.raises(UserError, match=r"backbone/a_new_one is absent, .* needs shape \[2\]"):
        checkpoints.restore(5, larger)
    smaller = state()
    del smaller.params["backbone"]["embedding"]
    with pytest.raises(UserError, match=r"backbone/embedding .* the model has no such parameter"):
        checkpoints.restore(5, smaller)


DAMAGES = {
    "one bit flipped": lambda b: b[:-9] + bytes([b[-9] ^ 4]) + b[-8:],
    "truncated": lambda b: b[: len(b) // 2],
    "emptied": lambda b: b"",
    "zeroed": lambda b: bytes(len(b)),
    "gone": lambda b: None,
}  # fmt: skip


def files_below(step: Path) -> list[Path]:
    return sorted(p.relative_to(step) for p in step.rglob("*") if p.is_file())


def check_damaged(directory: Path, step: Path, name: Path, damage: str, capsys) -> None:
    """Damages a file of checkpoint 6: readers take 5 and name the file, or 6 where it is whole."""
    copy = directory.with_name("copy")
    shutil.copytree(directory, copy)
    path = copy / "checkpoints" / "6" / name
    content = DAMAGES[damage](path.read_bytes())
    path.unlink() if content is None else path.write_bytes(content)
    capsys.readouterr()
    params, meta = load_params(copy)
    said = capsys.readouterr().err
    assert same(params, state(seed=meta["step"]).params), (name, damage)
    read = name.parts[0] in ("params", "meta", "checksums.json")
    assert meta["step"] == (5 if read else 6), (name, damage)
    assert ("checkpoint 6 is damaged: " in said and str(name) in said) == read
    assert f"read {copy}/checkpoints/{meta['step']}" in said
    checkpoints = Checkpoints(copy)
    found, meta = checkpoints.restore_latest(state())
    said = capsys.readouterr().err
    assert same(found, state(meta["step"], seed=meta["step"])), (name, damage)
    whole = str(name) in ("_CHECKPOINT_METADATA", "commit_success.txt")  # which nothing reads
    assert meta["step"] == (6 if whole else 5), (name, damage)
    if not whole:
        assert (
            said.count("\n") == 1 and str(name) in said and f"{copy}/checkpoints/6.damaged" in said
        )
        assert files_below(copy / "checkpoints" / "6.damaged")  # set aside, not deleted
        checkpoints.save(state(6, seed=6), META)  # goes on
        checkpoints.wait()
        assert Checkpoints(copy).restore_latest(state())[1]["step"] == 6
    shutil.rmtree(copy)


def test_damage_of_any_file_is_found_and_the_one_before_is_taken(tmp_path, capsys):
    """Every file of a checkpoint, each damaged in one of the ways."""
    saved(tmp_path / "good", [5, 6], keep=2)
    step = tmp_path / "good" / "checkpoints" / "6"
    for name, damage in zip(files_below(step), itertools.cycle(DAMAGES), strict=False):
        check_damaged(tmp_path / "good", step, name, damage, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_of_every_file(damage, tmp_path, capsys, request):
    saved(tmp_path / "good", [5, 6], keep=2)
    step = tmp_path / "good" / "checkpoints" / "6"
    for name in files_below(step):
        check_damaged(tmp_path / "good", step, name, damage, capsys)
    count = len(files_below(step))
    request.config.stash[TABLES].append(f"each of {count} files of a checkpoint: {damage}")


def test_what_is_no_checkpoint_at_all_is_set_aside(tmp_path, capsys):
    saved(tmp_path, [5, 6], keep=2)
    for name in ("99", "100"):
        (tmp_path / "checkpoints" / name).mkdir()
    (tmp_path / "checkpoints" / "99.damaged").mkdir()  # the name is taken
    assert load_params(tmp_path)[1]["step"] == 6
    assert Checkpoints(tmp_path).restore_latest(state())[1]["step"] == 6
    assert capsys.readouterr().err.count("set aside as") == 2
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {
        "5", "6", "99.damaged", "99.damaged-2", "100.damaged"
    }  # fmt: skip


def test_a_run_without_a_whole_checkpoint_does_not_begin_anew_by_itself(tmp_path):
    saved(tmp_path)
    (tmp_path / "checkpoints" / "5" / "meta" / "metadata").write_text("{}")
    with pytest.raises(UserError, match=r"cannot restore .*meta/metadata is not what was written"):
        load_params(tmp_path)
    for _ in range(2):
        with pytest.raises(UserError, match=r"no checkpoint in .* is whole: .* \*\.damaged"):
            Checkpoints(tmp_path).restore_latest(state())


# Runs in its own process, because threads of a failed save keep running for a while.
FAILING = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_checkpoints import META, Checkpoints, UserError, state
from moe_jax.core import ending
checkpoints = Checkpoints(Path(sys.argv[2]))
resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.RLIM_INFINITY))
try:
    checkpoints.save(state(6), META)
    checkpoints.wait()
except UserError as e:
    ending.fail(e)
"""


def test_a_write_that_fails_is_one_line_and_leaves_the_last_checkpoint(tmp_path):
    """A full disk, simulated by a limit on file sizes."""
    saved(tmp_path)
    command = [sys.executable, "-c", FAILING, str(Path(__file__).parent), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    error = f"error: cannot save to {tmp_path}/checkpoints: File too large"
    assert done.stderr.splitlines() == [error]
    assert kept(tmp_path) == {5}  # and nothing that is half written
    again = Checkpoints(tmp_path)
    assert same(again.restore(5, state())[0], state(5, seed=5))
    again.save(state(6, seed=6), META)
    again.wait()
    assert kept(tmp_path) == {5, 6}


def test_what_a_killed_run_was_writing_is_cleared_away(tmp_path):
    saved(tmp_path)
    shutil.copytree(tmp_path / "checkpoints" / "5", tmp_path / "left")
    (tmp_path / "left").rename(tmp_path / "checkpoints" / "6.orbax-checkpoint-tmp")
    checkpoints = Checkpoints(tmp_path)
    assert kept(tmp_path) == {5}
    checkpoints.save(state(6, seed=6), META)
    checkpoints.wait()
    assert kept(tmp_path) == {5, 6}
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


def test_the_settings_in_which_a_starting_point_differs_are_named(tmp_path):
    model, tasks = tiny_model(experts=1), ["a", "b", "c"]
    params = tiny_params(model)
    promises = jax.tree.map(lambda p: Promise(p.shape, lambda: np.asarray(p)), params)
    meta = {"tasks": tasks, "step": 3, "shapes": parameter_shapes(params)}
    save_params(tmp_path, 3, promises, meta)
    data = DataConfig(lengths={"inputs": 8, "targets": 8})
    directory.write_config(tmp_path, Config(RunConfig(), data, model.config, model.router_config))
    run = RunConfig(initial_checkpoint_path=str(tmp_path))
    place = SingleDeviceSharding(jax.devices()[0])
    filled = initial_params(tiny_model(experts=2, expert_noise=0.0), run, tasks, place)
    assert same(filled["backbone"]["embedding"], params["backbone"]["embedding"])
    said = "; ModelConfig.d_ff is 32 there, 48 here; ModelConfig.decoder_layers is 1 there, 2 here"
    with pytest.raises(UserError, match=rf"{tmp_path}: .*, the model .*{said}$"):
        initial_params(tiny_model(d_ff=48, decoder_layers=2), run, tasks, place)


def test_the_table_is_matched_by_task_name():
    params = state(seed=3).params
    found = fit_table(params, state().params, ["b", "a"], ["a", "b"], "here")
    table = np.asarray(params["representations"])
    np.testing.assert_array_equal(found["representations"], table[::-1])
    with pytest.raises(UserError, match="here: its task table has no 'c'"):
        fit_table(params, state().params, ["b", "a"], ["a", "c"], "here")
