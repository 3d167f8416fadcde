"""`python -m moe_jax.report --run NAME=DIR [--run NAME=DIR ...] --output DIR`."""

import argparse
from collections.abc import Sequence

from moe_jax.core.ending import one_line
from moe_jax.core.errors import UserError
from moe_jax.report import build
from moe_jax.report.cluster_sections import PERMUTATIONS


def main(argv: Sequence[str] | None = None) -> None:
    """Builds the report and prints its summary."""
    parser = argparse.ArgumentParser(
        prog="python -m moe_jax.report",
        description="Writes one self-contained HTML page with the scores and routes of runs.",
    )
    parser.add_argument(
        "--run",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="a run and its name in the report; repeatable; compared with the first one",
    )
    parser.add_argument("--finetune", metavar="DIR", help="directory of few-shot adaptation")
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="the run that the page is about (default: the last with routes over several experts)",
    )
    parser.add_argument(
        "--single", metavar="DIR", help="directory of runs of one task each, to compare with"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="where to write the report")
    parser.add_argument(
        "--permutations",
        type=int,
        default=PERMUTATIONS,
        help="shuffled controls (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    runs = {}
    for text in args.run:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise UserError(f"--run {text!r}: expected NAME=DIR")
        if name in runs:
            raise UserError(f"--run {text!r}: the name {name!r} is taken")
        runs[name] = path
    if args.permutations < 1:
        raise UserError(f"--permutations is {args.permutations}, expected 1 or more")
    made = build.report(
        args.output, runs, args.finetune, args.model, args.single, args.permutations
    )
    print("\n".join(made.summary))
    print(f"report: {made.page}")


if __name__ == "__main__":
    with one_line():
        main()
