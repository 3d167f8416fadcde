"""Groups side by side or one after the other: what `StepConfig.groups_at_once` = 0 is based on.

    python -m benchmarks.groups [--quick] [--json FILE]

`side_by_side_to_loop_<case>` is the time of a step with all groups side by side over that of a step
with one at a time; on CPU it is CPU time, which other programs change least. A case is D, the width
(feed-forward blocks have 4 D), T, the tokens of a group, and G, the number of groups. `product` is
G * T * D ** 2, the multiplications of one matrix product of all groups. The model has one encoder
and one decoder layer with 4 experts each, of which a group gathers one.
"""

import argparse
import time

import jax

from benchmarks.common import Report, Training, build, parse, parser, random_batch, run
from moe_jax.training.step import StepConfig

LENGTHS = (64, 24)
# scale: (width, rows of a group, groups)
CASES = {
    "tiny": [(32, 1, 2)],
    "quick": [(32, 2, 8), (64, 2, 8), (128, 2, 8), (256, 8, 8)],
    "full": [
        (32, 2, 8), (64, 1, 8), (64, 2, 8), (128, 1, 8), (64, 8, 8), (128, 2, 8), (192, 2, 8),
        (128, 8, 8), (256, 2, 8), (384, 2, 8), (256, 8, 8), (384, 8, 4),
    ],
}  # fmt: skip


def main() -> None:
    args = parse(parser(__doc__))
    report = Report("groups", args)
    for width, rows, groups in CASES[args.scale]:
        compare(report, args, width, rows, groups)
    report.finish()


def compare(report: Report, args: argparse.Namespace, width: int, rows: int, groups: int) -> None:
    """Measures one case."""
    sizes = {"d_model": width, "d_ff": 4 * width, "heads": max(2, width // 32)}
    model = build("tiny", 4, **sizes, vocabulary_size=1024)
    batch = random_batch(model, groups, rows, LENGTHS)
    runs = {}
    for name, at_once in (("one by one", 1), ("side by side", groups)):
        training = Training(model, StepConfig(groups_at_once=at_once))
        on_device = training.put(batch)
        runs[name] = lambda training=training, batch=on_device: training.run(batch)
    tokens = rows * sum(LENGTHS)
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    seconds = report.times(
        runs, 4 * args.rounds, clock=clock, width=width, tokens=tokens, groups=groups,
        product=groups * tokens * width**2,
    )  # fmt: skip
    ratio = seconds["side by side"] / seconds["one by one"]
    report.ratio(f"side_by_side_to_loop_D{width}_T{tokens}_G{groups}", ratio)


if __name__ == "__main__":
    run(main)
