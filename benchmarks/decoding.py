"""Decoding against `transformers`' `generate` on the same weights: greedy and 4 beams.

    python -m benchmarks.decoding [--quick] [--json FILE]

Every answer has the full length: on both sides, the end of sequence is forbidden until then.
`greedy_to_torch` and `beam4_to_torch` are sequences per second over those of `generate`, of the
dense model, one task; `..._short` has long inputs and short answers, so that encoding is most of
the work. `mixed_to_single` (and `mixed_to_single_beam4`) is the time of a batch whose rows are all
of different tasks over that of a single task, 3 experts, one per layer. `equal_tokens` and
`equal_tokens_beam4` are the share of tokens on which both sides agree.
"""

import argparse
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import (
    ROUTED,
    Report,
    Training,
    build,
    parse,
    parser,
    random_batch,
    run,
)
from moe_jax.data.batch import INPUTS
from moe_jax.decoding.rows import RowModel, row_routes
from moe_jax.decoding.search import DecodingConfig, DecodingIds, decode

IDS = DecodingIds(start=2, eos=2, pad=1)
# scale: (model size, rows, (input, output) length, the same with short answers)
PLANS = {
    "tiny": ("tiny", 4, (8, 8), (16, 4)),
    "quick": ("small", 16, (64, 64), (128, 16)),
    "full": ("bart_base", 16, (64, 64), (128, 16)),
}


def main() -> None:
    args = parse(parser(__doc__))
    report = Report("decoding", args)
    against_generate(args, report)
    mixed_tasks(args, report)
    report.finish()


def decoder(model, length: int, beams: int):
    """Jitted (backbone, routes, batch) -> tokens [R, length]."""
    config = DecodingConfig(num_beams=beams, min_length=length)

    def tokens(backbone, routes, batch):
        rows = {name: batch[name][0] for name in INPUTS}
        numbers = jnp.arange(len(rows["inputs"]))
        model_of_rows = RowModel(model, backbone, routes)
        return decode(model_of_rows, rows, numbers, length=length, config=config, ids=IDS)

    return jax.jit(tokens)


def against_generate(args: argparse.Namespace, report: Report, **peer: Any) -> None:
    """Compares dense models on both sides, at both pairs of lengths."""
    size, rows, *lengths = PLANS[args.scale]
    for suffix, pair in zip(("", "_short"), lengths, strict=True):
        _against_generate(report, args.rounds, size, rows, pair, suffix, **peer)


def _against_generate(
    report: Report, rounds: int, size: str, rows: int, lengths: tuple[int, int], suffix: str,
    **peer: Any,
) -> None:  # fmt: skip
    from benchmarks import torch_models as torch

    input_length, length = lengths
    settings = {} if not peer.get("bfloat16") else {"dtype": "bfloat16"}
    ours = Training(build(size, 1, init_std=0.1, **settings))
    params = ours.state.params["backbone"]
    batch = ours.put(random_batch(ours.model, 1, rows, (input_length, length)))
    generate = torch.generator(ours.model.config, params, batch["inputs"][0], length, **peer)
    for beams, name in ((1, "greedy"), (4, "beam4")):
        decode_all = decoder(ours.model, length, beams)
        runs = {
            "jax": lambda decode_all=decode_all: np.asarray(decode_all(params, None, batch)),
            "torch": lambda beams=beams: generate(beams),
        }
        seconds = report.times(
            runs, rounds, prefix=f"{name}, ", model=size, rows=rows,
            lengths=(input_length, length), sequences_per_run=rows,
        )  # fmt: skip
        report.ratio(f"{name}_to_torch{suffix}", seconds["torch"] / seconds["jax"])
        equal = float(np.mean(runs["jax"]() == runs["torch"]()))
        report.ratio(f"equal_tokens{'' if beams == 1 else f'_{name}'}{suffix}", equal)


def mixed_tasks(args: argparse.Namespace, report: Report, **settings: Any) -> None:
    """Compares rows of one task with rows that are all of different tasks."""
    size, rows, (input_length, length), _ = PLANS[args.scale]
    ours = Training(build(size, 3, ROUTED, tasks=rows, **settings))
    params = ours.state.params["backbone"]
    batch = ours.put(random_batch(ours.model, 1, rows, (input_length, length)))
    experts = np.random.default_rng(0).integers(0, 3, (rows, ours.model.layers))
    routes_TxNxE = np.eye(3, dtype=np.float32)[experts]
    for beams, name in ((1, ""), (4, "_beam4")):
        decode_all = decoder(ours.model, length, beams)

        def call(task_id_R, decode_all=decode_all):
            return np.asarray(decode_all(params, row_routes(routes_TxNxE, task_id_R, 1), batch))

        runs = {
            "single": partial(call, np.zeros(rows, int)),
            "mixed": partial(call, np.arange(rows)),
        }
        seconds = report.times(
            runs, args.rounds, prefix=f"tasks{name}, ", model=size, rows=rows,
            lengths=(input_length, length), sequences_per_run=rows, experts=3,
        )  # fmt: skip
        report.ratio(f"mixed_to_single{name}", seconds["mixed"] / seconds["single"])


if __name__ == "__main__":
    run(main)
