"""A minuscule model, hand-packed batches, and training runs on the toy tasks as subprocesses."""

import json
import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
from toy import NAMES, TASKS, VOCABULARY, toy_cache

from moe_jax.decoding.rows import RowModel
from moe_jax.decoding.search import DecodingConfig, DecodingIds, decode
from moe_jax.model.config import ModelConfig, RouterConfig
from moe_jax.model.task_moe import TaskMoE, init_params
from moe_jax.training.optimizer import OptimizerConfig, make_optimizer
from moe_jax.training.step import TrainState, init_state, state_shardings

ROOT = Path(__file__).resolve().parent.parent
PAD, EOS, START = 0, 1, 0
IDS = DecodingIds(START, EOS, PAD)
Row = list[tuple[list[int], list[int]]]  # examples (inputs, targets) packed into one row


def tiny_model(tasks: int = 3, experts: int = 4, **settings) -> TaskMoE:
    """One encoder and one decoder layer of width 16; settings of ModelConfig or RouterConfig."""
    model = {
        "vocabulary_size": 24,
        "d_model": 16,
        "d_ff": 32,
        "heads": 2,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "max_positions": 16,
        "init_std": 0.3,
        "dropout_rate": 0.0,
        "expert_noise": 0.3,
    }
    router = {"hidden_dim": 8, "representation_dim": 8}
    for name, value in settings.items():
        (model if hasattr(ModelConfig, name) else router)[name] = value
    return TaskMoE(ModelConfig(**model, experts=experts), RouterConfig(**router), tasks)


def tiny_params(model: TaskMoE, seed: int = 0):
    """Fresh parameters; route logits of order one, so that selections differ."""
    return jax.jit(lambda key: nn.meta.unbox(init_params(model, key)))(
        jax.random.key(seed, impl="rbg")
    )


def start_state(model: TaskMoE, config: OptimizerConfig, mesh, params) -> TrainState:
    """The state of `params` before the first step, with the shardings of the step's results."""
    optimizer = make_optimizer(config)
    places = state_shardings(model, optimizer, mesh)
    return jax.jit(lambda p: init_state(p, optimizer), out_shardings=places)(params)


def random_backbone(model: TaskMoE, seed: int = 0):
    """Parameters far from their initial values, made without compiling, so that decoded answers
    differ.

    The end of sequence has a long embedding, so it is often the most or the least likely token.
    """
    rng = np.random.default_rng(seed)

    def draw(path, p):
        name = path[-1].key
        std = 0.1 if name.endswith("bias") else 0.5
        return rng.normal(name == "scale", std, p.shape).astype(np.float32)

    shapes = nn.meta.unbox(jax.eval_shape(partial(init_params, model), jax.random.key(0)))[
        "backbone"
    ]
    params = jax.tree_util.tree_map_with_path(draw, shapes)
    output = params["embedding"] if model.config.tie_embeddings else params["head"].T
    output[EOS] *= 2.5
    return params


def decoder(model: TaskMoE, config: DecodingConfig, length: int, ids: DecodingIds = IDS):
    """Compiled: (backbone, routes, arrays of `pack_rows`, row numbers) -> tokens [R, length]."""

    @jax.jit
    def tokens(backbone, routes, arrays, row_R=None):
        row_R = np.arange(len(arrays["inputs"])) if row_R is None else row_R
        row_model = RowModel(model, backbone, routes)
        return decode(row_model, arrays, row_R, length=length, config=config, ids=ids)

    return tokens


def random_examples(rng: np.random.Generator, count: int) -> Row:
    """Examples of 1 to 4 random tokens and EOS on either side."""
    return [
        tuple([*rng.integers(2, 24, rng.integers(1, 5)).tolist(), EOS] for _ in range(2))
        for _ in range(count)
    ]


def pack_rows(rows: list[Row], input_length: int, target_length: int) -> dict[str, np.ndarray]:
    """The [R, L] arrays of rows, written out token by token."""
    inputs = {name: np.zeros((len(rows), input_length), np.int32) for name in
              ("inputs", "input_segments", "input_positions")}  # fmt: skip
    targets = {name: np.zeros((len(rows), target_length), np.int32) for name in
               ("decoder_inputs", "targets", "target_segments", "target_positions")}  # fmt: skip
    for r, row in enumerate(rows):
        at_input = at_target = 0
        for segment, (source, target) in enumerate(row, 1):
            for position, token in enumerate(source):
                inputs["inputs"][r, at_input] = token
                inputs["input_segments"][r, at_input] = segment
                inputs["input_positions"][r, at_input] = position
                at_input += 1
            for position, token in enumerate(target):
                targets["targets"][r, at_target] = token
                before = target[position - 1] if position else START
                targets["decoder_inputs"][r, at_target] = before
                targets["target_segments"][r, at_target] = segment
                targets["target_positions"][r, at_target] = position
                at_target += 1
    return inputs | targets


def stack_groups(groups: list[dict[str, np.ndarray]], task_ids: list[int]) -> dict[str, np.ndarray]:
    """Groups [R, L] -> a batch [G, R, L] with `task_id` [G]."""
    batch = {name: np.stack([group[name] for group in groups]) for name in groups[0]}
    return batch | {"task_id": np.array(task_ids, np.int32)}


def random_batch(groups: int = 8, rows: int = 2, tasks: int = 3, seed: int = 0):
    """Random packed rows of uneven length; every group has one of `tasks` tasks."""
    rng = np.random.default_rng(seed)
    content = [
        pack_rows([random_examples(rng, rng.integers(1, 3)) for _ in range(rows)], 12, 12)
        for _ in range(groups)
    ]
    return stack_groups(content, rng.integers(0, tasks, groups).tolist())


# ------------------------------------------------------------------------------ whole runs

SETTINGS = {
    "MIXTURE_OR_TASK_NAME": NAMES[0],
    "TASK_FEATURE_LENGTHS": {"inputs": 40, "targets": 20},
    "TRAIN_STEPS": 12,
    "BATCH_SIZE": 8,
    "EVAL_PERIOD": 0,
    "CHECKPOINT_PERIOD": 100,
    "DataConfig.rows_per_group": 2,
    "VocabularyConfig.size": VOCABULARY.size,
    "RunConfig.log_period": 2,
    "RunConfig.eval_examples": 4,
    "RunConfig.eval_batch_rows": 4,
    "ModelConfig.d_model": 16,
    "ModelConfig.d_ff": 32,
    "ModelConfig.heads": 2,
    "ModelConfig.encoder_layers": 1,
    "ModelConfig.decoder_layers": 1,
    "ModelConfig.max_positions": 48,
    "ModelConfig.init_std": 0.1,
    "ModelConfig.experts": 2,
    "RouterConfig.hidden_dim": 8,
    "RouterConfig.representation_dim": 8,
    "OptimizerConfig.learning_rate": 3e-3,
    "OptimizerConfig.clip_norm": 1.0,
}


def bindings(model_dir: Path, **settings) -> list[str]:
    """Gin bindings of a toy run; a setting's dot is written as two underscores."""
    changed = {name.replace("__", "."): value for name, value in settings.items()}
    paths = {"MODEL_DIR": str(model_dir), "CACHE_DIR": str(toy_cache()), "TASK_MODULES": TASKS}
    everything = paths | SETTINGS | changed
    return [f"{name} = {value!r}" for name, value in everything.items()]


def start(
    program: str, arguments: list[str], devices: int = 1, code: str | None = None,
    path: Path | None = None,
):  # fmt: skip
    """Starts `python -m moe_jax.PROGRAM`; with `code`, `python -c CODE`, which must run it.

    Args:
        path: a further directory in which modules are looked up.
    """
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")
    more = {"PYTHONPATH": f"{path}:{os.environ.get('PYTHONPATH', '')}"} if path else {}
    command = ["-c", code] if code else ["-m", f"moe_jax.{program}"]
    return subprocess.Popen(
        [sys.executable, *command, *arguments],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": flags} | more,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_together(
    count: int, arguments: list[str], program: str = "train", **settings
) -> list[subprocess.Popen]:
    """Starts so many processes that work together; `settings` are those of `start`."""
    if count == 1:
        return [start(program, arguments, **settings)]
    together = [
        "--multiprocess_gpu", f"--coordinator_address=127.0.0.1:{free_port()}",
        f"--process_count={count}",
    ]  # fmt: skip
    return [
        start(program, [*arguments, *together, f"--process_index={index}"], **settings)
        for index in range(count)
    ]


def flags_of(lines: list[str]) -> list[str]:
    """Gin bindings as flags."""
    return [f"--gin_bindings={line}" for line in lines]


def finish(process: subprocess.Popen, timeout: float = 300) -> str:
    """Waits for success and returns the standard output."""
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == 0, err[-3000:]
    return out


def metrics(model_dir: Path) -> list[dict]:
    """Lines of metrics.jsonl without the timings."""
    lines = (model_dir / "metrics.jsonl").read_text().splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if not name.startswith("time/")}
        for line in lines
    ]
