"""Step time by number of experts, with one per layer, against the dense model and all experts.

    python -m benchmarks.routing [--quick] [--json FILE]

`routed_to_dense_E<n>` is time over time at 1,024 input tokens per group (`..._256` at 256, without
--quick): for `bart_base` to 6 experts, for a smaller model (`_small` where both have the number) to
24. The dense model is that of E = 1. `routed_to_dense_E<n>_lazy` is with OptimizerConfig.lazy,
measured from 12 experts on. `routed_to_all_experts_E<n>` compares with computing every expert.
"""

from typing import Any

from benchmarks.common import (
    ALL_EXPERTS,
    ROUTED,
    Report,
    Training,
    build,
    parse,
    parser,
    random_batch,
    run,
)

LENGTHS = (128, 16)
# scale: (model size, experts, rows per group, groups, experts at which all are computed)
PLANS = {
    "tiny": [("tiny", (3, 24), 1, 2, (3,))],
    "quick": [("small", (3, 24), 8, 4, (3,))],
    "full": [
        ("bart_base", (3, 6), 8, 4, (3,)),
        ("bart_base", (3, 6), 2, 4, ()),
        ("small", (3, 6, 12, 24), 8, 8, (3, 6)),
        ("small", (3, 6, 12, 24), 2, 8, ()),
    ],
}


def main() -> None:
    args = parse(parser(__doc__))
    report = Report("routing", args)
    measured: set[str] = set()
    for size, experts, rows, groups, all_at in PLANS[args.scale]:
        for count in experts:
            key = f"E{count}"
            if rows * LENGTHS[0] < 1024 and args.scale != "tiny":
                key += f"_{rows * LENGTHS[0]}"
            if key in measured:
                key += f"_{size}"
            measured.add(key)
            compare(report, args.rounds, key, size, count, groups, rows, count in all_at)
    report.finish()


def compare(
    report: Report, rounds: int, key: str, size: str, experts: int, groups: int, rows: int,
    with_all: bool, **settings: Any,
) -> None:  # fmt: skip
    """Compares one number of experts with the dense model and with computing all experts."""
    dense = Training(build(size, 1, **settings))
    routed = Training(build(size, experts, ROUTED, **settings))
    batch = dense.put(random_batch(dense.model, groups, rows, LENGTHS))
    runs = {"dense": lambda: dense.run(batch), "routed": lambda: routed.run(batch)}
    # Lazy is the same if all experts are in use. The states of both optimizers take memory.
    if experts >= 12 and groups < experts:
        lazy = Training(build(size, experts, ROUTED, **settings), lazy=True)
        runs["routed, lazy"] = lambda: lazy.run(batch)
    if with_all:
        every = Training(build(size, experts, ALL_EXPERTS, **settings))
        runs["all experts"] = lambda: every.run(batch)
    seconds = report.times(
        runs, rounds, model=size, experts=experts, groups=groups,
        tokens_per_group=rows * LENGTHS[0],
    )  # fmt: skip
    report.ratio(f"routed_to_dense_{key}", seconds["routed"] / seconds["dense"])
    if "routed, lazy" in seconds:
        report.ratio(f"routed_to_dense_{key}_lazy", seconds["routed, lazy"] / seconds["dense"])
    if with_all:
        report.ratio(f"routed_to_all_experts_{key}", seconds["routed"] / seconds["all experts"])


if __name__ == "__main__":
    run(main)
