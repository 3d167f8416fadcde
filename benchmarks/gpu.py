"""The other benchmarks on one NVIDIA GPU in bfloat16, with model FLOPs use and largest batches.

    python -m benchmarks.gpu [--cache_dir DIR] [--quick] [--json FILE]

PyTorch runs under bfloat16 autocast with `torch.compile` and SDPA. `dense_to_torch_<model>` is
time over time; `mfu_<model>` is the share of the measured peak of a bfloat16 matrix product that
the step's multiplications (three times those of the forward pass; attention and logits counted,
rematerialisation and dropout not) amount to. The mixture is read from a prepared cache: make it
with `python -m benchmarks.training --quick` and copy the directory to the GPU machine. Needs no
network, and of the project's dependencies only jax, flax, optax, orbax, torch and transformers, and
the small wheels absl-py, array-record, gin-config, grain, sentencepiece and tokenizers.
"""

import os
import time

# PyTorch needs memory beside JAX.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp

from benchmarks import decoding, gym, routing, training
from benchmarks.common import Report, Training, build, parse, parser, random_batch, run
from moe_jax.core.errors import UserError
from moe_jax.model.config import ModelConfig

BFLOAT16 = {"dtype": "bfloat16"}
# scale: [(model size, rows, input and target length)] of the dense comparison
DENSE = {
    "tiny": [("tiny", 2, (16, 8))],
    "quick": [("bart_base", 32, (512, 64))],
    "full": [("bart_base", 64, (512, 64)), ("bart_large", 32, (512, 512))],
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


def peak_flops(size: int = 8192, rounds: int = 20) -> float:
    """FLOP/s of a large bfloat16 matrix product: the best of several."""
    a = jnp.ones((size, size), jnp.bfloat16)
    product = jax.jit(lambda a, b: a @ b)
    best = float("inf")
    product(a, a).block_until_ready()
    for _ in range(rounds):
        begin = time.perf_counter()
        product(a, a).block_until_ready()
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def dense(report: Report, size: str, rows: int, lengths: tuple[int, int], rounds: int) -> None:
    """Compares one dense bfloat16 step with PyTorch's; also gives the share of peak FLOP/s."""
    from benchmarks import torch_models as torch

    ours = Training(build(size, 1, **BFLOAT16))
    batch = random_batch(ours.model, 1, rows, lengths)
    on_device = ours.put(batch)
    theirs = torch.TorchTraining(torch.bart(ours.model.config), bfloat16=True, compiled=True)
    tensors = [torch.collate(torch.unpack(batch))]
    seconds = report.times(
        {"jax": lambda: ours.run(on_device), "torch": lambda: theirs.run(tensors)}, rounds,
        prefix=f"dense {size}, ", model=size, rows=rows, lengths=lengths,
        tokens_per_run=rows * sum(lengths),
    )  # fmt: skip
    report.ratio(f"dense_to_torch_{size}", seconds["jax"] / seconds["torch"])
    used = flops(ours.model.config, rows, lengths) / seconds["jax"] / peak_flops()
    report.ratio(f"mfu_{size}", used)


def largest_batch(size: str, lengths: tuple[int, int], experts: int, limit: int = 4096) -> int:
    """The largest power of two of rows that fits into memory; 0 if none does."""
    training = Training(build(size, experts, **BFLOAT16))
    rows = 1
    while rows <= limit:
        try:
            training.run(training.put(random_batch(training.model, 1, rows, lengths)))
        except jax.errors.JaxRuntimeError as e:
            if "RESOURCE_EXHAUSTED" not in str(e):
                raise
            break
        rows *= 2
    return rows // 2


def main() -> None:
    arguments = parser(__doc__)
    gym.add_flags(arguments)
    args = parse(arguments)
    if jax.default_backend() != "gpu" and args.scale != "tiny":
        raise UserError("benchmarks.gpu needs a GPU; JAX finds " + jax.default_backend())
    report = Report("gpu", args)
    report.fact("matrix product", peak_tflops=peak_flops(256 if args.tiny else 8192) / 1e12)
    for size, rows, lengths in DENSE[args.scale]:
        dense(report, size, rows, lengths, args.rounds)
        if args.scale == "full":
            for experts in (1, 3):
                largest = largest_batch(size, lengths, experts)
                report.fact(
                    "largest batch", model=size, experts=experts, rows=largest, lengths=lengths
                )
    plans = {"tiny": [("tiny", 3, 2, 2)], "quick": [("bart_base", 3, 4, 8)]}
    plans["full"] = [("bart_base", e, 4, 32) for e in (3, 6)] + [("small", 24, 8, 32)]
    for size, experts, groups, rows in plans[args.scale]:
        routing.compare(
            report,
            args.rounds,
            f"E{experts}",
            size,
            experts,
            groups,
            rows,
            experts == 3,
            **BFLOAT16,
        )
    peer = {"bfloat16": True, "compiled": True}
    if args.scale != "tiny":
        mixture, batches = training.read(args, report)
        shapes = training.ROW_SHAPES
        ours = training.on_mixture(
            report, args.scale, args.rounds, training.EXPERTS, mixture,
            batches(shapes=shapes), **peer,
        )  # fmt: skip
        training.fed(report, args.scale, 2 * args.rounds, ours, batches(shapes=shapes))
    decoding.against_generate(args, report, bfloat16=True)
    decoding.mixed_tasks(args, report, **BFLOAT16)
    report.finish()


if __name__ == "__main__":
    run(main)
