"""Makes glibc's malloc keep freed memory, which speeds up steps of large models on CPU.

XLA allocates temporary arrays in every step. By default, glibc maps such large blocks for each use
and unmaps them when they are freed, and the kernel must clear each page again. That takes a tenth
of a step, or a third with many experts. With another C library, these functions do nothing.
"""

import ctypes
import platform

import jax

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's <malloc.h>
_libc = ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def run_in_main_thread() -> None:
    """Makes computations on one CPU device run in the calling thread. Call it before JAX starts.

    `keep_freed` needs it, because only the main thread's heap has no size limit.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)


def keep_freed() -> None:
    """From now on, freed memory stays with the process, to be used again.

    Call it after the first step, so that memory freed by initialising and compiling is not kept.
    """
    if jax.default_backend() == "cpu":
        _set(_MMAP_MAX, 0)
        _set(_TRIM_THRESHOLD, -1)


def give_back() -> None:
    """Ends `keep_freed` and returns free memory to the kernel, for example before another model."""
    _set(_MMAP_MAX, 65536)
    _set(_TRIM_THRESHOLD, 128 * 1024)
    if _libc is not None:
        _libc.malloc_trim(0)


def _set(parameter: int, value: int) -> None:
    if _libc is not None:
        _libc.mallopt(parameter, value)
