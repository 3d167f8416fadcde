"""Shared by the benchmarks: command line, machine, models, interleaved timing, table and JSON."""

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.core import files, paths
from moe_jax.core.errors import UserError
from moe_jax.core.sharding import MeshConfig, by_group, make_mesh
from moe_jax.kernels import memory
from moe_jax.model.config import ModelConfig, RouterConfig
from moe_jax.model.task_moe import TaskMoE, init_params
from moe_jax.training.optimizer import OptimizerConfig, make_optimizer
from moe_jax.training.step import PRNG, StepConfig, init_state, make_train_step, state_shardings

CACHE = Path.home() / ".cache" / "moe_jax"
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocabulary_size": 128, "d_model": 32, "d_ff": 64, "heads": 2, "encoder_layers": 1,
        "decoder_layers": 1,
    },
    "small": {
        "vocabulary_size": 8192, "d_model": 384, "d_ff": 1536, "heads": 6, "encoder_layers": 3,
        "decoder_layers": 3, "unroll_layers": 3,
    },
    "bart_base": {"vocabulary_size": 50265, "unroll_layers": 6},
    "bart_large": {
        "vocabulary_size": 50265, "d_model": 1024, "d_ff": 4096, "heads": 16, "encoder_layers": 12,
        "decoder_layers": 12,
    },
}  # fmt: skip
# Routing in training: one expert per layer by Gumbel-softmax with straight-through gradients.
ROUTED = RouterConfig(selection="gumbel_softmax_st", experts_per_layer=1)
ALL_EXPERTS = RouterConfig(selection="gumbel_softmax_st")


def parser(doc: str) -> argparse.ArgumentParser:
    """The flags that every benchmark has; `doc` is its module's docstring."""
    result = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--quick", action="store_true", help="small sizes, within 3 minutes")
    result.add_argument("--tiny", action="store_true", help="smallest sizes, to test that it runs")
    result.add_argument("--json", metavar="FILE", help="also write the results here")
    result.add_argument(
        "--rounds",
        type=int,
        help="measurements per case (default 5, --quick 3; short ones twice)",
    )
    return result


def parse(arguments: argparse.ArgumentParser) -> argparse.Namespace:
    """Parses the command line and starts JAX with the project's compilation cache."""
    args = arguments.parse_args()
    args.scale = "tiny" if args.tiny else "quick" if args.quick else "full"
    args.rounds = args.rounds or (5 if args.scale == "full" else 3)
    memory.run_in_main_thread()
    # On a GPU, PyTorch and other processes need memory beside JAX.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(CACHE / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    return args


def run(main: Callable[[], None]) -> None:
    """Runs a benchmark; bad input ends in one line."""
    try:
        main()
    except UserError as e:
        sys.exit(f"error: {e}")


def machine() -> dict[str, Any]:
    """The machine of the measurements. `load` is its load average over the last minute."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), cpu)
    versions = {}
    for name in ("jax", "jaxlib", "flax", "torch", "transformers"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "load": round(os.getloadavg()[0], 2),
        "devices": [device.device_kind for device in jax.devices()],
        "python": platform.python_version(),
        "versions": versions,
    }


def interleave(
    runs: Mapping[str, Callable[[], Any]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each run, `rounds` times. Runs take turns, so that all see the same load.

    Args:
        runs: name -> function to time, which must block until it is done. Each is called twice
            first, because the first call compiles.
    """
    for run in runs.values():
        run()
    memory.keep_freed()
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for start in range(rounds):
        names = list(runs)
        for name in names[start % len(names) :] + names[: start % len(names)]:
            begin = clock()
            runs[name]()
            seconds[name].append(clock() - begin)
    memory.give_back()
    return seconds


class Report:
    """A benchmark's results: each is printed and written to the JSON as soon as it is there.

    Args:
        again: continues the JSON of an earlier process, if it is there.
    """

    def __init__(self, name: str, args: argparse.Namespace, again: bool = False):
        self._json = args.json
        self._result: dict[str, Any] = {
            "benchmark": name,
            "scale": args.scale,
            "machine": machine(),
            "rows": [],
            "ratios": {},
        }
        if again and (path := paths.parse(args.json)).exists():
            self._result |= json.loads(path.read_text())

    def times(
        self,
        runs: Mapping[str, Callable[[], Any]],
        rounds: int,
        prefix: str = "",
        clock: Callable[[], float] = time.perf_counter,
        steps: int = 1,
        **facts: Any,
    ) -> dict[str, float]:
        """Rows of interleaved runs; the median of each.

        Args:
            steps: that each run takes; times are those of one.
            facts: columns of the rows; `<unit>_per_run` gives a column `<unit>_per_s`.
        """
        medians = {}
        for name, seconds in interleave(runs, rounds, clock).items():
            seconds = [s / steps for s in seconds]
            median = medians[name] = float(np.median(seconds))
            row = {"what": prefix + name, "median_s": median}
            row |= {"min_s": min(seconds), "max_s": max(seconds)}
            for key, value in facts.items():
                unit = key.removesuffix("_per_run")
                row |= {key: value} if unit == key else {f"{unit}_per_s": value / median / steps}
            self._add(row)
        return medians

    def fact(self, what: str, **facts: Any) -> None:
        """A row without times."""
        self._add({"what": what, **facts})

    def ratio(self, name: str, value: float) -> None:
        """One entry of `ratios`.

        Raises:
            FloatingPointError: it is not a number.
        """
        if not math.isfinite(value):
            raise FloatingPointError(f"{name} is {value}")
        self._result["ratios"][name] = float(f"{value:.4g}")
        print(f"  {name}: {value:.4g}", flush=True)
        self._save()

    def case(self, name: str, state: str) -> None:
        """What has become of a case."""
        self._result.setdefault("cases", {})[name] = state
        self._save()

    def _add(self, row: dict[str, Any]) -> None:
        self._result["rows"].append(row)
        facts = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
        print("  " + ", ".join(facts).removeprefix("what "), flush=True)
        self._save()

    def _save(self) -> None:
        if self._json:
            files.write_json(self._json, self._result)

    def finish(self) -> None:
        """Prints all results as a table."""
        show(self._result)


def show(result: Mapping[str, Any]) -> None:
    """Prints a report's JSON as a table."""
    print(f"\n{result['benchmark']} ({result['scale']})")
    for key, value in result["machine"].items():
        print(f"  {key}: {value}")
    rows = [
        {k: f"{v:.4g}" if isinstance(v, float) else str(v) for k, v in row.items()}
        for row in result["rows"]
    ]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    widths = [max(len(c), *(len(row.get(c, "")) for row in rows)) for c in columns]
    for row in [dict(zip(columns, columns, strict=True)), *rows]:
        cells = (row.get(c, "").ljust(w) for c, w in zip(columns, widths, strict=True))
        print("  ".join(cells).rstrip())
    for part in ("cases", "ratios"):
        if part in result:
            print(part)
        for name, value in result.get(part, {}).items():
            print(f"  {name}: {value}")


# ------------------------------------------------------------------------------ models and steps


def build(size: str, experts: int, router: RouterConfig = ROUTED, tasks: int = 8, **settings):
    """A model of one of `SIZES`; settings of ModelConfig override."""
    config = ModelConfig(**{**SIZES[size], **settings}, experts=experts)
    return TaskMoE(config, router, tasks)


def random_batch(
    model: TaskMoE, groups: int, rows: int, lengths: tuple[int, int], seed: int = 0
) -> dict[str, np.ndarray]:
    """Random tokens without padding: [G, R, L] arrays. Neighbouring groups are of different
    tasks."""
    rng = np.random.default_rng(seed)
    batch = {}
    for side, length in zip(("input", "target"), lengths, strict=True):
        shape = (groups, rows, length)
        tokens = rng.integers(4, model.config.vocabulary_size, shape).astype(np.int32)
        positions = np.broadcast_to(np.arange(length, dtype=np.int32), shape)
        batch |= {f"{side}s": tokens, f"{side}_segments": np.ones(shape, np.int32)}
        batch[f"{side}_positions"] = np.ascontiguousarray(positions)
    batch["decoder_inputs"] = np.roll(batch["targets"], 1, axis=-1)
    batch["decoder_inputs"][..., 0] = 2
    return {**batch, "task_id": np.arange(groups, dtype=np.int32) % model.tasks}


class Training:
    """A model, its state and its jitted step on one device; `run(batch)` does one step.

    Args:
        settings: of OptimizerConfig.
    """

    def __init__(self, model: TaskMoE, step_config: StepConfig | None = None, **settings: Any):
        self.model = model
        self.mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        config = OptimizerConfig(**settings)
        self.rates = {k: jnp.float32(v) for k, v in config.learning_rates.items()}
        with jax.set_mesh(self.mesh):
            optimizer = make_optimizer(config)
            places = state_shardings(model, optimizer, self.mesh)
            params = jax.jit(
                lambda key: nn.meta.unbox(init_params(model, key)), out_shardings=places.params
            )(jax.random.key(0, impl=PRNG))
            # A separate call: the moments take no memory while the parameters are drawn.
            self.state = jax.jit(lambda p: init_state(p, optimizer), out_shardings=places)(params)
            step_config = step_config or StepConfig()
            self.step = make_train_step(model, config, step_config, self.mesh, 1_000_000, seed=0)

    def put(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """The batch on the device."""
        return jax.device_put(dict(batch), by_group(self.mesh))

    def compile(self, batch: Mapping[str, Any], options: Any = None) -> dict[str, float]:
        """Compiles the step for such a batch: the seconds that took, and GiB that the program takes
        with its state, as XLA has planned them."""
        with jax.set_mesh(self.mesh):
            begin = time.perf_counter()
            self.step = self.step.lower(self.state, batch, self.rates).compile(options)
            seconds = time.perf_counter() - begin
        plan = self.step.memory_analysis()
        new = plan.output_size_in_bytes - plan.alias_size_in_bytes
        size = plan.argument_size_in_bytes + plan.temp_size_in_bytes + new
        return {"compile_s": seconds, "program_gib": size / 2**30}

    def run(self, batch: Mapping[str, Any], steps: int = 1) -> float:
        """Runs steps to the end of the last; returns its loss.

        Raises:
            FloatingPointError: it is not a number.
        """
        with jax.set_mesh(self.mesh):
            for _ in range(steps):
                self.state, metrics = self.step(self.state, batch, self.rates)
            jax.block_until_ready(self.state)
        loss = float(metrics["loss"])
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss}")
        return loss


def real_tokens(batch: Mapping[str, np.ndarray]) -> int:
    """Input and target tokens that are not padding."""
    return sum(int(np.count_nonzero(batch[f"{side}_segments"])) for side in ("input", "target"))
