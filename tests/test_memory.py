"""Freed memory stays with the process, so that a large block brings no page faults, or goes."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import resource
import jax
import jax.numpy as jnp
from moe_jax import memory

memory.run_in_main_thread()
x = jnp.ones((8192, 16))
step = jax.jit(lambda x: (x @ x.T) @ x)  # 268 MB of temporaries

def faults():
    start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(x).block_until_ready()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start

before = [faults() for _ in range(3)][-1]
memory.keep_freed()
kept = min([faults() for _ in range(4)][1:])
memory.give_back()
after = faults()
print(before, kept, after)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not glibc")
def test_a_steps_temporaries_are_taken_again_without_page_faults():
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True,
        cwd=Path(__file__).parent.parent,
        # Several virtual devices would run in threads of their own.
        env=os.environ | {"XLA_FLAGS": ""},
    )  # fmt: skip
    before, kept, after = map(int, result.stdout.split())
    assert min(before, after) > 120  # huge pages: one for every 2 MB
    assert kept < 10
