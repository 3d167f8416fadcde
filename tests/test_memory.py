"""Freed memory stays with the process, so that a large block brings no page faults, or goes."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import resource
import numpy as np
from moe_jax import memory

def faults():
    start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(1 << 24)  # 128 MB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start

memory.share_heap(1 << 20)  # too small a model for anything to happen
memory.keep_freed()
[faults() for _ in range(3)]
memory.share_heap(1 << 27)
before = [faults() for _ in range(3)][-1]
memory.keep_freed()
kept = [faults() for _ in range(3)][-1]
memory.give_back()
after = faults()
print(before, kept, after)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not glibc")
def test_a_large_block_is_taken_again_without_page_faults():
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True,
        cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    before, kept, after = map(int, result.stdout.split())
    assert min(before, after) > 60  # huge pages: one for every 2 MB
    assert kept < 10
