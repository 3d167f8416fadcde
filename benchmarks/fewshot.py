"""Few-shot runs side by side against the plain loop, one run and one step after the other.

    python -m benchmarks.fewshot [--quick] [--json FILE]

`side_by_side_to_loop_E1` and `..._E3` are runs per second, training alone and everything compiled,
over those of the loop on one device; the mixture computes all experts. `seconds_to_compile_...` is
what the first call takes longer.
"""

import time
from typing import Any

import jax
import numpy as np

from benchmarks.common import Report, build, parse, parser, random_batch, run
from moe_jax.core.sharding import MeshConfig, device_per_core, make_mesh, replicated
from moe_jax.data.batch import of_rows
from moe_jax.decoding.search import DecodingConfig, DecodingIds
from moe_jax.model.config import RouterConfig
from moe_jax.model.task_moe import init_params
from moe_jax.training.optimizer import OptimizerConfig
from moe_jax.training.step import StepConfig
from moe_jax.training.tuning import Tuner
from moe_jax.unseen.side_by_side import SideBySide

# scale: (settings of the model, runs, steps, (input, target) length); batches of 8 of 16 examples
GYM = {"vocabulary_size": 1024, "d_model": 64, "d_ff": 256, "heads": 4, "encoder_layers": 2,
       "decoder_layers": 2, "unroll_layers": 2, "dropout_rate": 0.0}  # fmt: skip
PLANS: dict[str, tuple[dict[str, Any], int, int, tuple[int, int]]] = {
    "tiny": ({}, 4, 2, (8, 4)),
    "quick": (GYM, 16, 16, (40, 12)),
    "full": (GYM, 64, 16, (40, 12)),
}
ROWS, EXAMPLES = 8, 16


def main() -> None:
    arguments = parse(parser(__doc__))
    device_per_core()
    report = Report("fewshot", arguments)
    for experts in (1, 3):
        settings, runs, steps, lengths = PLANS[arguments.scale]
        model = build("tiny", experts, RouterConfig(selection="softmax"), tasks=1, **settings)
        both = _both(report, model, runs, steps, lengths)
        seconds = report.times(
            both, arguments.rounds, prefix=f"E={experts}, ", steps=steps, lengths=lengths,
            runs_per_run=runs,
        )  # fmt: skip
        report.ratio(f"side_by_side_to_loop_E{experts}", seconds["loop"] / seconds["side by side"])
    report.finish()


def _both(report: Report, model, runs: int, steps: int, lengths: tuple[int, int]):
    """The same runs in both ways."""
    mesh = make_mesh(MeshConfig(), jax.local_devices())
    alone = make_mesh(MeshConfig(data=1), jax.local_devices()[:1])
    runs += -runs % mesh.devices.size
    rng = np.random.default_rng(0)
    config = OptimizerConfig(learning_rate=1e-3)
    few = [of_rows(random_batch(model, 1, EXAMPLES, lengths, seed)) for seed in range(runs)]
    examples = {name: np.concatenate([each[name] for each in few]) for name in few[0]}
    order = rng.integers(0, EXAMPLES, (runs, steps, ROWS)).astype(np.int32)
    rates = {part: np.full(runs, rate, np.float32) for part, rate in config.learning_rates.items()}
    with jax.set_mesh(mesh):
        key = jax.random.key(0)
        params = jax.jit(
            lambda: jax.tree.map(
                lambda p: p.value, init_params(model, key), is_leaf=lambda p: hasattr(p, "value")
            ),
            out_shardings=replicated(mesh),
        )()
    here = jax.device_put(jax.device_get(params), replicated(alone))
    runner = SideBySide(
        model, config, StepConfig(), mesh, steps=steps, runs=runs, rows=1, length=1,
        decoding=DecodingConfig(), ids=DecodingIds(2, 2, 1),
    )  # fmt: skip
    tune = Tuner(model, config, StepConfig(), alone, steps, seed=0)

    def side_by_side():
        with jax.set_mesh(mesh):
            return jax.block_until_ready(next(runner.train(params, {}, examples, order, rates)))

    def loop():
        with jax.set_mesh(alone):
            for r in range(runs):
                batches = (
                    {name: array[r][rows][None] for name, array in examples.items()}
                    | {"task_id": np.zeros(1, np.int32)}
                    for rows in order[r]
                )
                found = tune(here, batches, {part: rate[r] for part, rate in rates.items()})
            return jax.block_until_ready(found)

    for name, call in (("side_by_side", side_by_side), ("loop", loop)):
        begin = time.perf_counter()
        call()
        first = time.perf_counter() - begin
        begin = time.perf_counter()
        call()
        extra = first - (time.perf_counter() - begin)
        report.ratio(f"seconds_to_compile_{name}_E{model.config.experts}", max(extra, 1e-3))
    return {"side by side": side_by_side, "loop": loop}


if __name__ == "__main__":
    run(main)
