"""Memory and traffic of a training step on TPU pods and on 8 CPU devices, by `moe_jax.plan`.

    python -m benchmarks.scaling [--only large xl] [--json FILE]

Compiles every case in a process of its own, 1 to 4 minutes each, and prints its figures as they
come, then how they compare. Needs `pip install 'moe_jax[plan]'` and no TPU.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from moe_jax.core import files

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Case:
    """A step to compile: groups of 4 rows of 512 + 64 tokens, one expert per layer.

    Attributes:
        where: the flag that names the devices.
        embedding_bytes: of the float32 token embedding.
        more: further gin settings.
    """

    model: str
    experts: int
    where: str
    groups: int
    mesh: dict[str, int]
    embedding_bytes: int = 4 * 50265 * 1024
    more: tuple[str, ...] = ()

    def flags(self) -> list[str]:
        """Command-line flags of `moe_jax.plan`."""
        settings = {
            "ModelConfig.experts": self.experts,
            "ModelConfig.dtype": "bfloat16",
            "ModelConfig.vocabulary_size": 32128 if self.model.startswith("t5") else 50265,
            "RouterConfig.selection": "gumbel_softmax_st",
            "RouterConfig.experts_per_layer": 1,
            "TASK_FEATURE_LENGTHS": {"inputs": 512, "targets": 64},
            "DataConfig.rows_per_group": 4,
            "BATCH_SIZE": 4 * self.groups,
            **{f"MeshConfig.{axis}": size for axis, size in self.mesh.items()},
        }
        gin = [f"--gin.{name}={value}" for name, value in settings.items()]
        more = [f"--gin.{setting}" for setting in self.more]
        return [self.where, f"--gin_file=models/{self.model}.gin", *gin, *more]


# A configuration in which parameters take most of a step's memory on one device.
PARAMETERS = (
    "ModelConfig.dtype=float32", "ModelConfig.vocabulary_size=8192", "ModelConfig.d_model=512",
    "ModelConfig.d_ff=2048", "ModelConfig.heads=8", "DataConfig.rows_per_group=1",
    "BATCH_SIZE=8", "TASK_FEATURE_LENGTHS={'inputs': 32, 'targets': 16}",
)  # fmt: skip
CASES = {
    "large": Case("bart_large", 12, "--topology=v5e:4x4", 16, {"data": 1, "fsdp": 16}),
    "large_64": Case("bart_large", 12, "--topology=v5e:8x8", 64, {"data": 1, "fsdp": 64}),
    "large_e48": Case("bart_large", 48, "--topology=v5e:4x4", 16, {"data": 1, "fsdp": 16}),
    "xl": Case(
        "t5_1_1_xl", 8, "--topology=v5e:16x16", 256, {"data": 1, "fsdp": 256},
        embedding_bytes=4 * 32128 * 2048,
    ),
    "cpu_1": Case("tiny", 8, "--devices=1", 8, {}, more=PARAMETERS),
    "cpu_8": Case("tiny", 8, "--devices=8", 8, {"data": 1, "fsdp": 8}, more=PARAMETERS),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    plans = {}
    for name in args.only:
        plans[name] = plan(name)
        print(f"{name}: {describe(name, plans[name])}", flush=True)
    ratios = compare(plans)
    for name, ratio in ratios.items():
        print(f"{name:<50}{ratio:8.3f}")
    if args.json:
        files.write_json(args.json, {"plans": plans, "ratios": ratios})


def plan(name: str) -> dict[str, Any]:
    """The JSON that `moe_jax.plan` writes for a case, whether it fits or not."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "plan.json"
        command = [sys.executable, "-m", "moe_jax.plan", *CASES[name].flags(), f"--json={path}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if not path.exists():
            sys.exit(f"{name}: {done.stderr.strip()[-2000:]}")
        return json.loads(path.read_text())


def describe(name: str, figures: dict[str, Any]) -> str:
    """The figures of one case, in one line."""
    mesh = ", ".join(f"{axis}={size}" for axis, size in CASES[name].mesh.items()) or "one device"
    parts = [
        f"{figures['devices']} x {figures['device']}, {mesh}",
        f"state {figures['state_bytes'] / GIB:.3f} GiB",
        f"temporaries {figures['temporary_bytes'] / GIB:.3f} GiB",
        "fits" if figures["fits"] else "does not fit",
    ]
    parts += [
        f"{kind} {c['count']} x, {c['bytes'] / GIB:.3f} GiB, "
        f"largest {c['largest_bytes'] / 2**20:.1f} MiB"
        for kind, c in figures["collectives"].items()
    ]
    if figures["least_seconds"] is not None:
        parts.append(f"at least {figures['least_seconds'] * 1e3:.1f} ms")
    return "; ".join(parts)


def compare(plans: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Ratios of the cases that were compiled."""
    ratios = {}

    def ratio(name: str, key: str, of: str, to: str) -> None:
        if of in plans and to in plans:
            ratios[name] = plans[of][key] / plans[to][key]

    ratio("large: state of 64 devices to 16", "state_bytes", "large_64", "large")
    ratio("large: temporaries of 64 devices to 16", "temporary_bytes", "large_64", "large")
    ratio("large: temporaries of E=48 to E=12", "temporary_bytes", "large_e48", "large")
    ratio("cpu: state and temporaries of 8 devices to 1", "total_bytes", "cpu_8", "cpu_1")
    for name, plan_of in plans.items():
        if CASES[name].where.startswith("--topology") and plan_of["collectives"]:
            largest = plan_of["collectives"].get("all-reduce", {"largest_bytes": 0})
            key = f"{name}: largest all-reduce to the embedding"
            ratios[key] = largest["largest_bytes"] / CASES[name].embedding_bytes
    return ratios


if __name__ == "__main__":
    main()
