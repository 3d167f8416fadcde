"""One GPU in bfloat16: use of its peak, comparison with PyTorch, routing, and what fits.

    python -m benchmarks.gpu [--quick] [--only NAME] [--limit_s SECONDS] [--json FILE]

The cases run in the order of `CASES`. Every figure is printed and written to the file of --json as
soon as it is there, and no case begins after the time limit (150 s with --quick, otherwise 480).

`mfu_<model>` is the share of the measured peak of a bfloat16 matrix product that the step's
multiplications (three times those of the forward pass; attention and logits counted,
recomputation and dropout not) amount to. `dense_to_torch_<model>` is time over time; PyTorch runs
under bfloat16 autocast with `torch.compile` and SDPA. `routed_to_dense_E<n>` compares steps with
8,192 tokens per group: 4 groups with 3 experts; with 24 experts, which AdamW updates whatever the
batch is, 32 groups and, as `routed_to_dense_E24_4_groups`, 4. `cublas_to_all_<model>` is the time
of the dense step if all matrix products are cuBLAS's, over that with XLA's choice of these and
Triton's. `fused_to_plain_error` is about 1 if fused attention is right (`agreement`).
The case `mixture` reads a prepared cache: make it with `python -m benchmarks.training --quick`, and
copy its directory to the GPU machine.

Needs no network, and of the project's dependencies only jax, flax, optax, orbax, torch and
transformers, and the small wheels absl-py, array-record, gin-config, grain, sentencepiece and
tokenizers.
"""

import argparse
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

# PyTorch needs memory beside JAX.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from benchmarks import decoding, gym, routing, training
from benchmarks.common import Report, Training, build, parse, parser, random_batch, run
from moe_jax.core.errors import UserError, say
from moe_jax.model.config import ModelConfig
from moe_jax.model.task_moe import init_params
from moe_jax.training.grouped_loss import group_loss
from moe_jax.training.step import PRNG, StepConfig

# As in `devices/gpu.gin`.
FAST = {
    "dtype": "bfloat16", "kept_activations": "products", "vocabulary_multiple": 128,
    "attention": "fused",
}  # fmt: skip
LIMIT_S = {"tiny": 480, "quick": 150, "full": 480}
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


def dense(case: str) -> Callable[[Report, argparse.Namespace], None]:
    """The case that measures a dense step of this size: its use of the peak, and how long the
    first step took, which compiles."""

    def measure(report: Report, args: argparse.Namespace) -> None:
        size, rows, lengths = DENSE[case][args.scale]
        ours = dense_training(size)
        batch = ours.put(random_batch(ours.model, 1, rows, lengths))
        begin = time.perf_counter()
        ours.run(batch)
        report.fact(f"{case}: first step, compilation included", s=time.perf_counter() - begin)
        seconds = report.times(
            {"jax": lambda: ours.run(batch)}, 2 * args.rounds, prefix=f"dense {case}, ", rows=rows,
            lengths=lengths, tokens_per_run=rows * sum(lengths),
        )  # fmt: skip
        used = flops(ours.model.config, rows, lengths) / seconds["jax"] / peak(report, args)
        report.ratio(f"mfu_{case}", used)

    return measure


def dense_training(size: str) -> Training:
    """A dense model of this size, its layers unrolled: no loop copies what they keep."""
    layers = build(size, 1).config.encoder_layers
    return Training(build(size, 1, **FAST, unroll_layers=layers))


def cublas(report: Report, args: argparse.Namespace) -> None:
    """The dense step without Triton's matrix products: XLA compiles and tries none of them, and
    adds biases in cuBLAS's."""
    size, rows, lengths = DENSE["bart_large"][args.scale]
    every, only = dense_training(size), dense_training(size)
    batch = every.put(random_batch(every.model, 1, rows, lengths))
    with jax.set_mesh(only.mesh):
        lowered = only.step.lower(only.state, batch, only.rates)
        begin = time.perf_counter()
        only.step = lowered.compile({"xla_gpu_enable_triton_gemm": False})
        report.fact("cuBLAS only: compiling", s=time.perf_counter() - begin)
    seconds = report.times(
        {"all": partial(every.run, batch), "cuBLAS only": partial(only.run, batch)}, args.rounds,
        prefix="dense bart_large, products ", rows=rows, lengths=lengths,
    )  # fmt: skip
    report.ratio("cublas_to_all_bart_large", seconds["cuBLAS only"] / seconds["all"])


def to_torch(report: Report, args: argparse.Namespace) -> None:
    """Compares one dense step with PyTorch's."""
    from benchmarks import torch_models as torch

    size, rows, lengths = DENSE["bart_base"][args.scale]
    ours = dense_training(size)
    batch = random_batch(ours.model, 1, rows, lengths)
    on_device = ours.put(batch)
    theirs = torch.TorchTraining(torch.bart(ours.model.config), bfloat16=True, compiled=True)
    tensors = [torch.collate(torch.unpack(batch))]
    seconds = report.times(
        {"jax": lambda: ours.run(on_device), "torch": lambda: theirs.run(tensors)}, args.rounds,
        prefix="dense bart_base, ", rows=rows, lengths=lengths, tokens_per_run=rows * sum(lengths),
    )  # fmt: skip
    report.ratio("dense_to_torch_bart_base", seconds["jax"] / seconds["torch"])


def routed(experts: int, groups: int, key: str) -> Callable[[Report, argparse.Namespace], None]:
    """The case that compares a step with so many experts with the dense step."""

    def measure(report: Report, args: argparse.Namespace) -> None:
        size, rows = ("tiny", 2) if args.scale == "tiny" else ("bart_base", 64)
        routing.compare(report, args.rounds, key, size, experts, groups, rows, False, **FAST)

    return measure


def small_steps(report: Report, args: argparse.Namespace) -> None:
    """A step of a model that launches of kernels bound: `tiny`, as the skills gym trains it, its
    groups one after the other and side by side."""
    groups = 8
    # A third fewer kernels than in a loop over layers that computes activations again.
    model = build("tiny", 4, **FAST | {"kept_activations": "all", "unroll_layers": 2})
    batch = random_batch(model, groups, 2, (64, 24))
    runs = {}
    for name, at_once in (("tiny", 1), ("tiny, groups side by side", groups)):
        training = Training(model, StepConfig(groups_at_once=at_once))
        runs[name] = partial(training.run, training.put(batch))
    seconds = report.times(runs, 4 * args.rounds, experts=4, groups=groups, rows=2)
    one_by_one, together = seconds.values()
    report.ratio("side_by_side_to_loop_tiny", together / one_by_one)


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
    """The largest powers of two of rows that fit into memory."""
    size, limit = ("tiny", 2) if args.scale == "tiny" else ("bart_large", 256)
    training = Training(build(size, 1, **FAST))
    rows = 1 if args.scale == "tiny" else 32
    while rows <= limit:
        try:
            training.run(training.put(random_batch(training.model, 1, rows, (512, 512))))
        except jax.errors.JaxRuntimeError as e:
            if "RESOURCE_EXHAUSTED" not in str(e):
                raise
            break
        report.fact("fits", model=size, rows=rows, lengths=(512, 512))
        rows *= 2


def mixture(report: Report, args: argparse.Namespace) -> None:
    """Steps on the real gym's mixture, against PyTorch and against one repeated batch."""
    read, batches = training.read(args, report)
    shapes = training.ROW_SHAPES
    ours = training.on_mixture(
        report, args.scale, args.rounds, training.EXPERTS, read, batches(shapes=shapes),
        bfloat16=True, compiled=True,
    )  # fmt: skip
    training.fed(report, args.scale, 2 * args.rounds, ours, batches(shapes=shapes))


def generation(report: Report, args: argparse.Namespace) -> None:
    """Decoding against `transformers`, and rows of several tasks against rows of one."""
    decoding.against_generate(args, report, bfloat16=True)
    decoding.mixed_tasks(args, report, dtype="bfloat16")


CASES: dict[str, Callable[[Report, argparse.Namespace], object]] = {
    "peak": peak,
    "bart_base": dense("bart_base"),
    "bart_large": dense("bart_large"),
    "tiny": small_steps,
    "routed_e3": routed(3, 4, "E3"),
    "to_torch": to_torch,
    "routed_e24": routed(24, 32, "E24"),
    "routed_e24_4_groups": routed(24, 4, "E24_4_groups"),
    "cublas": cublas,
    "agreement": agreement,
    "attention": attention,
    "fits": fits,
    "decoding": generation,
    "mixture": mixture,
}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--only", choices=CASES, action="append", help="repeatable")
    arguments.add_argument("--limit_s", type=float, help="no case begins later than this")
    gym.add_flags(arguments)
    args = parse(arguments)
    if jax.default_backend() != "gpu" and args.scale != "tiny":
        raise UserError("benchmarks.gpu needs a GPU; JAX finds " + jax.default_backend())
    report, begin = Report("gpu", args), time.perf_counter()
    limit = args.limit_s or LIMIT_S[args.scale]
    for name in args.only or CASES:
        if time.perf_counter() - begin > limit:
            say(f"{name} and later cases are left out: {limit:.0f} s are over")
            break
        print(f"{name}, after {time.perf_counter() - begin:.0f} s", flush=True)
        try:
            CASES[name](report, args)
        except (UserError, ImportError) as e:  # the other cases need neither data nor PyTorch
            say(f"{name} is left out: {e}")
    report.finish()


if __name__ == "__main__":
    run(main)
