"""One GPU in bfloat16: use of its peak, comparison with PyTorch, routing, and what fits.

    python -m benchmarks.gpu [--quick] [--only NAME] [--attention plain] [--limit_s SECONDS]
        [--json FILE]

The cases run in the order of `CASES`, in another process. Every figure is printed and written to
the file of --json as soon as it is there. A case that fails, or takes over two thirds of the time
limit, loses no other (`cases`). At the limit all ends: 140 s with --quick, otherwise 470. Programs
are compiled anew, unless JAX_COMPILATION_CACHE_DIR names a directory that keeps them.

`mfu_<model>` is the share of the measured peak of a bfloat16 matrix product that the step's
multiplications (three times those of the forward pass; attention and logits counted,
recomputation and dropout not) amount to. `compile_s_<model>` is the time of tracing and compiling
its step. `bart_large` is a loop over layers, `bart_large_unrolled` is none; `bart_base` is
unrolled. `dense_to_torch_<model>` is time over time; PyTorch runs under bfloat16 autocast with
`torch.compile` and SDPA. `tiny_step_ms` is of `models/tiny.gin` in stage 1 of the skills gym.
`gib_64_rows` is what a step of `bart_large` with 64 rows takes with its state, once it has run.
`routed_to_dense_E<n>` compares steps with 8,192 tokens per group: 4 groups with 3 experts; with 24
experts, which AdamW updates whatever the batch is, 32 groups and, as
`routed_to_dense_E24_4_groups`, 4. `cublas_to_all_<model>` is the time of the dense step if all
matrix products are cuBLAS's, over that with XLA's choice of these and Triton's.
`fused_to_plain_error` is about 1 if fused attention is right (`agreement`).
The case `mixture` reads a prepared cache: make it with `python -m benchmarks.training --quick`, and
copy its directory to the GPU machine.

Needs no network, and of the project's dependencies only jax, flax, optax, and the small wheels
sentencepiece and tokenizers; `to_torch` and `decoding` need torch and transformers, and `mixture`
these and orbax, absl-py, array-record, gin-config and grain.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from benchmarks import gym, routing
from benchmarks.cases import run_cases, supervise
from benchmarks.common import Report, Training, build, parse, parser, random_batch, run
from moe_jax.core import paths
from moe_jax.core.errors import UserError
from moe_jax.model.config import ModelConfig, RouterConfig
from moe_jax.model.task_moe import init_params
from moe_jax.planning.chips import fraction_variable
from moe_jax.training.grouped_loss import group_loss
from moe_jax.training.step import PRNG, StepConfig

# As in `devices/gpu.gin`.
FAST = {
    "dtype": "bfloat16", "kept_activations": "products", "vocabulary_multiple": 128,
    "attention": "fused",
}  # fmt: skip
# `models/tiny.gin` in `runs/skills_gym_stage1.gin`, but what it keeps and unrolls: a third fewer
# kernels than in a loop over layers that computes activations again.
GYM = {
    "vocabulary_size": 1024, "d_model": 64, "d_ff": 256, "heads": 4, "encoder_layers": 2,
    "decoder_layers": 2, "max_positions": 256, "init_std": 0.08, "dropout_rate": 0.0, **FAST,
    "kept_activations": "all", "unroll_layers": 2,
}  # fmt: skip
GYM_ROUTER = RouterConfig(
    selection="argmax", experts_per_layer=1, hidden_dim=32, representation_dim=32
)
LIMIT_S = {"tiny": 1800, "quick": 140, "full": 470}
STEPS = 5  # without waiting for each, as in training
# case -> scale -> (model size, rows, input and target length)
DENSE = {
    "bart_base": {
        "tiny": ("tiny", 2, (16, 8)),
        "quick": ("bart_base", 32, (512, 64)),
        "full": ("bart_base", 64, (512, 64)),
    },
    "bart_large": {
        "tiny": ("tiny", 2, (16, 16)),
        "quick": ("bart_large", 16, (512, 512)),
        "full": ("bart_large", 32, (512, 512)),
    },
}


def fast(args: argparse.Namespace) -> dict[str, Any]:
    """`FAST` with the attention that the flag names."""
    return FAST | {"attention": args.attention}


def flops(config: ModelConfig, rows: int, lengths: tuple[int, int]) -> float:
    """Multiplications and additions of forward and backward of one dense step."""
    D, F, inputs, targets = config.d_model, config.d_ff, *lengths
    block = 2 * 2 * D * F + 2 * 4 * D * D  # of one token: feed-forward and self-attention
    encoder = inputs * (block + 2 * 2 * inputs * D)
    # Half of the causal scores are masked, but computed by most implementations: counted as half.
    cross = targets * (2 * 2 * D * D + 2 * 2 * inputs * D) + inputs * 2 * 2 * D * D
    decoder = targets * (block + 2 * targets * D) + cross
    logits = targets * 2 * D * config.vocabulary_size
    return 3.0 * rows * (config.encoder_layers * encoder + config.decoder_layers * decoder + logits)


def peak(report: Report, args: argparse.Namespace) -> float:
    """FLOP/s of a large bfloat16 matrix product: the best of several."""
    size = 256 if args.scale == "tiny" else 8192
    a = jnp.ones((size, size), jnp.bfloat16)
    product = jax.jit(lambda a, b: a @ b)
    best = float("inf")
    product(a, a).block_until_ready()
    for _ in range(20):
        begin = time.perf_counter()
        product(a, a).block_until_ready()
        best = min(best, time.perf_counter() - begin)
    result = 2 * size**3 / best
    report.fact("matrix product", peak_tflops=result / 1e12)
    return result


def dense(case: str, unrolled: bool = False) -> Callable[[Report, argparse.Namespace], None]:
    """The case that measures a dense step of this size: its use of the peak, and how long
    compiling took."""
    name = f"{case}_unrolled" if unrolled else case

    def measure(report: Report, args: argparse.Namespace) -> None:
        size, rows, lengths = DENSE[case][args.scale]
        ours = dense_training(args, size, unrolled)
        batch = ours.put(random_batch(ours.model, 1, rows, lengths))
        compiling = ours.compile(batch)
        report.fact(f"dense {name}", attention=args.attention, **compiling)
        report.ratio(f"compile_s_{name}", compiling["compile_s"])
        seconds = report.times(
            {"jax": partial(ours.run, batch, STEPS)}, 2 * args.rounds, prefix=f"dense {name}, ",
            steps=STEPS, rows=rows, lengths=lengths, tokens_per_run=STEPS * rows * sum(lengths),
        )  # fmt: skip
        used = flops(ours.model.config, rows, lengths) / seconds["jax"] / peak(report, args)
        report.ratio(f"mfu_{name}", used)

    return measure


def dense_training(args: argparse.Namespace, size: str, unrolled: bool = False) -> Training:
    """A dense model of this size.

    Args:
        unrolled: all layers are, also where the size has a loop over them.
    """
    config = build(size, 1).config
    layers = config.encoder_layers if unrolled else config.unroll_layers
    return Training(build(size, 1, **fast(args), unroll_layers=layers))


def cublas(report: Report, args: argparse.Namespace) -> None:
    """The dense step without Triton's matrix products: XLA compiles and tries none of them, and
    adds biases in cuBLAS's."""
    size, rows, lengths = DENSE["bart_large"][args.scale]
    every, only = (dense_training(args, size, unrolled=True) for _ in range(2))
    batch = every.put(random_batch(every.model, 1, rows, lengths))
    report.fact("cuBLAS only", **only.compile(batch, {"xla_gpu_enable_triton_gemm": False}))
    seconds = report.times(
        {"all": partial(every.run, batch), "cuBLAS only": partial(only.run, batch)}, args.rounds,
        prefix="dense bart_large, products ", rows=rows, lengths=lengths,
    )  # fmt: skip
    report.ratio("cublas_to_all_bart_large", seconds["cuBLAS only"] / seconds["all"])


def to_torch(report: Report, args: argparse.Namespace) -> None:
    """Compares one dense step with PyTorch's."""
    from benchmarks import torch_models as torch

    size, rows, lengths = DENSE["bart_base"][args.scale]
    ours = dense_training(args, size)
    batch = random_batch(ours.model, 1, rows, lengths)
    on_device = ours.put(batch)
    theirs = torch.TorchTraining(torch.bart(ours.model.config), bfloat16=True, compiled=True)
    tensors = [torch.collate(torch.unpack(batch))]
    seconds = report.times(
        {"jax": partial(ours.run, on_device, STEPS), "torch": partial(theirs.run, tensors, STEPS)},
        args.rounds, prefix="dense bart_base, ", steps=STEPS, rows=rows, lengths=lengths,
        tokens_per_run=STEPS * rows * sum(lengths),
    )  # fmt: skip
    report.ratio("dense_to_torch_bart_base", seconds["jax"] / seconds["torch"])


def routed(experts: int, groups: int, key: str) -> Callable[[Report, argparse.Namespace], None]:
    """The case that compares a step with so many experts with the dense step."""

    def measure(report: Report, args: argparse.Namespace) -> None:
        size, rows = ("tiny", 2) if args.scale == "tiny" else ("bart_base", 64)
        routing.compare(report, args.rounds, key, size, experts, groups, rows, False, **fast(args))

    return measure


def small_steps(report: Report, args: argparse.Namespace) -> None:
    """A step of a model that launches of kernels bound: `tiny`, as the skills gym trains it, its
    groups side by side and, without --quick, one after the other."""
    groups, steps = 8, 4 * STEPS
    small = {"encoder_layers": 1, "decoder_layers": 1} if args.scale == "tiny" else {}
    model = build("tiny", 4, GYM_ROUTER, **GYM | small | {"attention": args.attention})
    batch = random_batch(model, groups, 2, (64, 24))
    runs = {}
    for name, at_once in (("tiny", 0), ("tiny, one group at a time", 1)):
        if at_once != 1 or args.scale != "quick":
            config = StepConfig(label_smoothing=0.0, groups_at_once=at_once)
            training = Training(model, config, shared_gradient=0.5)
            runs[name] = partial(training.run, training.put(batch), steps)
    seconds = report.times(
        runs, 2 * args.rounds, steps=steps, experts=4, groups=groups, rows=2, lengths=(64, 24)
    )
    report.ratio("tiny_step_ms", 1e3 * seconds["tiny"])
    if len(seconds) > 1:
        report.ratio("side_by_side_to_loop_tiny", seconds["tiny"] / list(seconds.values())[1])


def attention(report: Report, args: argparse.Namespace) -> None:
    """The dense step with fused attention, against plain attention."""
    size, rows, lengths = DENSE["bart_large"][args.scale]
    steps = {
        how: Training(build(size, 1, **FAST | {"attention": how})) for how in ("plain", "fused")
    }
    batch = steps["plain"].put(random_batch(steps["plain"].model, 1, rows, lengths))
    seconds = report.times(
        {how: partial(step.run, batch) for how, step in steps.items()}, args.rounds,
        prefix="dense bart_large, attention ", rows=rows, lengths=lengths,
    )  # fmt: skip
    report.ratio("fused_to_plain_attention", seconds["fused"] / seconds["plain"])


def agreement(report: Report, args: argparse.Namespace) -> None:
    """How far the gradient of a T5 with fused attention is from that with plain attention in
    float32, as a share of its norm; and the same of plain attention in bfloat16. Rows hold several
    examples and padding, attention weights are dropped."""
    size, length = ("tiny", 32) if args.scale == "tiny" else ("small", 512)
    batch: dict[str, Any] = random_batch(build(size, 1), 1, 4, (length, length))
    batch = {name: x[0] for name, x in batch.items()}
    for side in ("input", "target"):  # three examples, and what is left is padding
        batch[f"{side}_segments"] = (batch[f"{side}_positions"] * 4 // length + 1) % 4

    def gradient(dtype: str, attention: str):
        settings = {"attention": attention, "dtype": dtype, "attention_dropout_rate": 0.1}
        model = build(size, 1, architecture="t5", **settings)
        params = nn.meta.unbox(init_params(model, jax.random.key(0, impl=PRNG)))["backbone"]
        loss = partial(group_loss, model, dispatch=None, key=jax.random.key(1, impl=PRNG))
        with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
            return jax.jit(jax.grad(lambda params: loss(params, group=batch)))(params)

    exact = gradient("float32", "plain")
    far = {}
    for attention in ("plain", "fused"):
        error = jax.tree.map(jnp.subtract, gradient("bfloat16", attention), exact)
        far[attention] = float(optax.global_norm(error) / optax.global_norm(exact))
        report.fact(f"gradient in bfloat16, attention {attention}", error=far[attention])
    report.ratio("fused_to_plain_error", far["fused"] / far["plain"])


def fits(report: Report, args: argparse.Namespace) -> None:
    """Whether 64 rows fit into the memory that JAX takes and, without --quick, how many more."""
    size, first = ("tiny", 1) if args.scale == "tiny" else ("bart_large", 64)
    for rows in (first, 2 * first, 4 * first)[: 1 if args.scale == "quick" else None]:
        training = Training(build(size, 1, **fast(args)))
        facts = {"model": size, "rows": rows, "lengths": (512, 512)}
        try:
            batch = training.put(random_batch(training.model, 1, rows, (512, 512)))
            facts |= training.compile(batch)
            training.run(batch)
        except jax.errors.JaxRuntimeError as e:
            if "RESOURCE_EXHAUSTED" not in str(e):
                raise
            return report.fact("does not fit", **facts)
        report.fact("fits", **facts)
        if rows == first:
            report.ratio(f"gib_{rows}_rows", facts["program_gib"])
        del training  # before the next one is made


def mixture(report: Report, args: argparse.Namespace) -> None:
    """Steps on the real gym's mixture, against PyTorch and against one repeated batch."""
    from benchmarks import training

    read, batches = training.read(args, report)
    shapes = training.ROW_SHAPES
    ours = training.on_mixture(
        report, args.scale, args.rounds, training.EXPERTS, read, batches(shapes=shapes),
        bfloat16=True, compiled=True,
    )  # fmt: skip
    training.fed(report, args.scale, 2 * args.rounds, ours, batches(shapes=shapes))


def generation(report: Report, args: argparse.Namespace) -> None:
    """Decoding against `transformers`, and rows of several tasks against rows of one."""
    from benchmarks import decoding

    decoding.against_generate(args, report, bfloat16=True)
    decoding.mixed_tasks(args, report, dtype="bfloat16")


# First what --quick has time for.
CASES: dict[str, Callable[[Report, argparse.Namespace], object]] = {
    "peak": peak,
    "bart_base": dense("bart_base"),
    "bart_large": dense("bart_large"),
    "tiny": small_steps,
    "fits": fits,
    "routed_e3": routed(3, 4, "E3"),
    "to_torch": to_torch,
    "routed_e24": routed(24, 32, "E24"),
    "routed_e24_4_groups": routed(24, 4, "E24_4_groups"),
    "bart_large_unrolled": dense("bart_large", unrolled=True),
    "cublas": cublas,
    "agreement": agreement,
    "attention": attention,
    "decoding": generation,
    "mixture": mixture,
}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--only", choices=CASES, action="append", help="repeatable")
    arguments.add_argument(
        "--attention", choices=("fused", "plain"), default="fused",
        help="that of training steps",
    )  # fmt: skip
    arguments.add_argument("--limit_s", type=float, help="all ends then")
    arguments.add_argument("--child", nargs="+", help="used internally: runs these cases here")
    gym.add_flags(arguments)
    args = parse(arguments)
    limit_s = args.limit_s or LIMIT_S[args.scale]
    if args.child:
        if jax.default_backend() != "gpu" and args.scale != "tiny":
            raise UserError("benchmarks.gpu needs a GPU; JAX finds " + jax.default_backend())
        cases = {name: partial(CASES[name], args=args) for name in args.child}
        return run_cases(cases, Report("gpu", args, again=True), limit_s * 2 / 3)
    with tempfile.TemporaryDirectory() as directory:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", directory)
        os.environ.setdefault(fraction_variable(), "0.885")  # 70 GiB of an H100's 79
        json_file = paths.parse(args.json or Path(directory, "result.json"))
        command = [sys.executable, "-m", "benchmarks.gpu", *sys.argv[1:], f"--json={json_file}"]
        supervise([*command, "--child"], args.only or list(CASES), json_file, limit_s)


if __name__ == "__main__":
    run(main)
