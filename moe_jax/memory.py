"""Host memory: what glibc's malloc keeps, for steps of large models on CPU.

XLA allocates a step's temporaries anew in every step. Blocks so large glibc maps afresh and unmaps
when they are freed, and the kernel must clear each page again: a tenth of a step, or a third where
there are many experts. Where the C library is not glibc, nothing happens here.
"""

import ctypes
import platform

import jax

# Of glibc's <malloc.h>.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
# What glibc keeps by itself at most (DEFAULT_MMAP_THRESHOLD_MAX).
LARGEST_KEPT = 32 << 20
_libc = ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
_shared = False


def share_heap(temporaries: int) -> None:
    """All threads take memory from one heap, which `keep_freed` needs; call before JAX starts any.

    Args:
        temporaries: bytes that a step takes at least. Less than 32 MB glibc keeps by itself, and
            with small models threads would wait for each other: then nothing happens.
    """
    global _shared
    if temporaries >= LARGEST_KEPT:
        _shared = True
        _set(_ARENA_MAX, 1)


def keep_freed() -> None:
    """From now on, what is freed stays with the process, to be used again, if the heap is shared.

    Call after the first step: what initialising and compiling have freed is not kept.
    """
    if _shared and jax.default_backend() == "cpu":
        _set(_MMAP_MAX, 0)
        _set(_TRIM_THRESHOLD, -1)


def give_back() -> None:
    """Ends `keep_freed`, before a model of another size: what is free goes to the kernel."""
    _set(_MMAP_MAX, 65536)
    _set(_TRIM_THRESHOLD, 128 * 1024)
    if _libc is not None:
        _libc.malloc_trim(0)


def _set(parameter: int, value: int) -> None:
    if _libc is not None:
        _libc.mallopt(parameter, value)
