"""Training against PyTorch: `transformers`' BART, and the mixture that computes all experts on it.

    python -m benchmarks.training [--crossfit_dir DIR] [--quick] [--json FILE]

1. One batch without padding, input 128, target 16: `dense_to_torch` is our dense step's time over
   PyTorch's; `all_experts_to_torch` is PyTorch's time over ours where both compute all 3 experts.
2. The few-shot mixture of a CrossFit directory: steps of our packed batches, and PyTorch's steps on
   the examples of the same batches, shuffled, 16 at once, padded to the longest of the 16. Ratios
   `padding_share` (3 row shapes), `padding_share_one_shape` and `padding_share_unpacked`,
   `tokens_per_s_to_torch_all_experts` (E = 3) and, without --quick, `tokens_per_s_to_torch_dense`
   are tokens per second, without padding, over PyTorch's. `pipeline_to_repeated_batch` compares our
   step's time on the pipeline's batches (of one shape) with its time on one repeated batch.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from benchmarks import gym
from benchmarks.common import (
    ALL_EXPERTS,
    SIZES,
    Report,
    Training,
    build,
    parse,
    parser,
    random_batch,
    real_tokens,
    run,
)
from moe_jax.data.cache import PreparedMixture
from moe_jax.data.packing import padding_share
from moe_jax.data.pipeline import train_batches

EXPERTS = 3
MICRO_BATCH = 16  # examples that PyTorch runs at once
ROW_SHAPES = 3  # DataConfig.row_shapes of the mixture
PADDING_BATCHES = 50  # batches over which padding is measured
# scale: (model size, groups and rows of the unpadded batch, its lengths, groups, rows and lengths
# of the mixture's batches, how many of them)
PLANS: dict[str, tuple] = {
    "tiny": ("tiny", (1, 2), (16, 8), (2, 1), (64, 16), 1),
    "quick": ("small", (4, 2), (128, 16), (2, 4), (256, 32), 1),
    "full": ("bart_base", (4, 2), (128, 16), (2, 2), (512, 64), 3),
}


def main() -> None:
    arguments = parser(__doc__)
    gym.add_flags(arguments)
    args = parse(arguments)
    report = Report("training", args)
    mixture, batches = read(args, report)
    for experts in (1, EXPERTS):
        same_batch(report, args.scale, 2 * args.rounds, experts)
    for experts in (1, EXPERTS) if args.scale == "full" else (EXPERTS,):
        pipeline = batches(shapes=ROW_SHAPES)
        ours = on_mixture(report, args.scale, args.rounds, experts, mixture, pipeline)
    fed(report, args.scale, 2 * args.rounds, ours, batches(shapes=ROW_SHAPES))
    report.finish()


def same_batch(report: Report, scale: str, rounds: int, experts: int, **peer: Any) -> None:
    """Compares steps on the same batch without padding, with all experts computed."""
    from benchmarks import torch_models as torch

    size, (groups, rows), lengths, *_ = PLANS[scale]
    ours = Training(build(size, experts, ALL_EXPERTS))
    batch = random_batch(ours.model, groups, rows, lengths)
    on_device = ours.put(batch)
    theirs = torch.TorchTraining(torch.mixture(ours.model), **peer)
    tensors = [torch.collate(torch.unpack(batch), tasks=experts > 1)]
    seconds = report.times(
        {"jax": lambda: ours.run(on_device), "torch": lambda: theirs.run(tensors)}, rounds,
        prefix="one batch, ", model=size, experts=experts, examples=groups * rows, lengths=lengths,
    )  # fmt: skip
    if experts == 1:
        report.ratio("dense_to_torch", seconds["jax"] / seconds["torch"])
    else:
        report.ratio("all_experts_to_torch", seconds["torch"] / seconds["jax"])


def read(
    args: argparse.Namespace, report: Report
) -> tuple[PreparedMixture, Callable[..., Iterator[Any]]]:
    """Returns the mixture and a function for its batches; reports their padding."""
    size, _, _, (groups, rows), lengths, _ = PLANS[args.scale]
    mixture = gym.mixture(args.crossfit_dir, args.cache_dir, SIZES[size]["vocabulary_size"])
    limits = dict(zip(("inputs", "targets"), lengths, strict=True))

    def batches(**settings: Any) -> Iterator[Any]:
        return iter(train_batches(mixture, lengths=limits, groups=groups, rows=rows, **settings))

    shapes = {"": ROW_SHAPES, "_one_shape": 1}
    for name, count in shapes.items():
        first = itertools.islice(batches(shapes=count), PADDING_BATCHES)
        shares = [padding_share(batch) for batch in first]
        padding = {key: float(np.mean([share[key] for share in shares])) for key in shares[0]}
        report.fact(f"padding, {count} row shapes, {PADDING_BATCHES} batches", **padding)
        report.ratio(f"padding_share{name}", padding["all"])
    report.ratio("padding_share_unpacked", padding["unpacked"])
    return mixture, batches


def on_mixture(
    report: Report, scale: str, rounds: int, experts: int, mixture: PreparedMixture,
    pipeline: Iterator[Any], **peer: Any,
) -> Training:  # fmt: skip
    """Compares steps on the same examples: one expert per layer here, all experts in PyTorch.

    Returns our side.
    """
    from benchmarks import torch_models as torch

    size, *_, lengths, count = PLANS[scale]
    ids = mixture.vocabulary
    model = build(
        size, experts, tasks=len(mixture.names), vocabulary_size=ids.size,
        dtype="bfloat16" if peer.get("bfloat16") else "float32",
    )  # fmt: skip
    ours = Training(model)
    theirs = torch.TorchTraining(torch.mixture(model, ids), **peer)
    batches = list(itertools.islice(pipeline, count))
    on_device = [ours.put(batch) for batch in batches]
    order, steps = np.random.default_rng(0), []
    for batch in batches:
        examples = torch.unpack(batch)
        order.shuffle(examples)
        starts = range(0, len(examples), MICRO_BATCH)
        chunks = [examples[start : start + MICRO_BATCH] for start in starts]
        steps.append([torch.collate(chunk, ids, experts > 1) for chunk in chunks])
    seconds = report.times(
        {
            "jax": lambda: [ours.run(batch) for batch in on_device],
            "torch": lambda: [theirs.run(step) for step in steps],
        },
        rounds, prefix="mixture, ", model=size, experts=experts, lengths=lengths,
        vocabulary=ids.size, tokens_per_run=sum(map(real_tokens, batches)),
    )  # fmt: skip
    name = "dense" if experts == 1 else "all_experts"
    report.ratio(f"tokens_per_s_to_torch_{name}", seconds["torch"] / seconds["jax"])
    return ours


def fed(report: Report, scale: str, rounds: int, ours: Training, pipeline: Iterator[Any]) -> None:
    """Compares steps on the pipeline's batches, of one shape, with steps on one repeated batch."""
    size, *_, lengths, _ = PLANS[scale]
    first = next(pipeline)
    batch = ours.put(first)
    shape = [first[side].shape for side in ("inputs", "targets")]
    same_shape = (b for b in pipeline if [b[side].shape for side in ("inputs", "targets")] == shape)
    seconds = report.times(
        {
            "one batch repeated": lambda: ours.run(batch),
            "batches as they come": lambda: ours.run(ours.put(next(same_shape))),
        },
        rounds, prefix="mixture, ", model=size, experts=EXPERTS, lengths=lengths,
    )  # fmt: skip
    ratio = seconds["batches as they come"] / seconds["one batch repeated"]
    report.ratio("pipeline_to_repeated_batch", ratio)


if __name__ == "__main__":
    run(main)
