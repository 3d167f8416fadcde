"""Peak memory of a training step against the number of experts, one per layer.

    python -m benchmarks.memory [--quick] [--json FILE]

Every model runs in its own process. `peak_gb` is the peak resident size of that process (on GPU, of
the device) minus its size before the model was made; `program_gb` is XLA's figure for the step:
state (parameters, two moments) and temporary memory. `memory_E<n>_to_dense` are peaks over the
dense model's, `memory_per_parameter_E<n>` bytes per parameter.
"""

import json
import resource
import subprocess
import sys

import jax

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
# scale: (model size, groups, rows, experts)
PLANS = {
    "tiny": ("tiny", 2, 2, (3,)),
    "quick": ("small", 4, 2, (3, 6)),
    "full": ("bart_base", 4, 8, (3, 6)),
}


def child(size: str, groups: int, rows: int, experts: int, every: bool) -> dict[str, float]:
    """Runs two steps in this process; returns GB and the number of parameters."""
    jax.devices()
    before = _peak()
    training = Training(build(size, experts, ALL_EXPERTS if every else ROUTED))
    batch = training.put(random_batch(training.model, groups, rows, LENGTHS))
    training.run(batch)
    training.run(batch)
    peak = _peak() - before
    with jax.set_mesh(training.mesh):
        lowered = training.step.lower(training.state, batch, training.rates)
    plan = lowered.compile().memory_analysis()
    parameters = sum(p.size for p in jax.tree.leaves(training.state.params))
    return {
        "peak_gb": peak / 1e9,
        "program_gb": (plan.argument_size_in_bytes + plan.temp_size_in_bytes) / 1e9,
        "temporary_gb": plan.temp_size_in_bytes / 1e9,
        "parameters": parameters,
    }


def _peak() -> int:
    statistics = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in statistics:
        return statistics["peak_bytes_in_use"]
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--child", help="used internally: measures one model")
    args = parse(arguments)
    if args.child:
        print(json.dumps(child(*json.loads(args.child))))
        return
    report = Report("memory", args)
    measure(report, *PLANS[args.scale])
    report.finish()


def measure(report: Report, size: str, groups: int, rows: int, experts: tuple[int, ...]) -> None:
    """Adds a row per model."""
    dense = None
    for count, every in [(1, False), *((n, False) for n in experts), (experts[0], True)]:
        job = json.dumps([size, groups, rows, count, every])
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.memory", "--child", job],
            check=True, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        result = json.loads(done.stdout.splitlines()[-1])
        name = "dense" if count == 1 else f"E={count}" + (", all experts" if every else "")
        print(f"  {name}: {result['peak_gb']:.2f} GB", flush=True)
        report.fact(name, model=size, groups=groups, rows=rows, lengths=LENGTHS, **result)
        dense = dense or result
        if every:
            continue
        report.ratio(
            f"memory_per_parameter_E{count}", 1e9 * result["peak_gb"] / result["parameters"]
        )
        if count > 1:
            report.ratio(f"memory_E{count}_to_dense", result["peak_gb"] / dense["peak_gb"])


if __name__ == "__main__":
    run(main)
