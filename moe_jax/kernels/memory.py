"""Host memory: what glibc's malloc keeps, for steps of large models on CPU.

XLA allocates a step's temporaries anew in every step. Blocks so large glibc maps afresh and unmaps
when they are freed, and the kernel must clear each page again: a tenth of a step, or a third where
there are many experts. Where the C library is not glibc, nothing is kept.
"""

import ctypes
import platform

import jax

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's <malloc.h>
_libc = ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def run_in_main_thread() -> None:
    """Lets the thread that calls a computation run it, on one CPU device; before JAX starts.

    `keep_freed` needs it: the heap of the main thread is the only one that grows to any size.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)


def keep_freed() -> None:
    """From now on, what is freed stays with the process, to be used again.

    Call after the first step: what initialising and compiling have freed is not kept.
    """
    if jax.default_backend() == "cpu":
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
