"""keep_freed_memory: the next step finds the memory that this one frees, instead of page faults."""

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
SETTINGS = ("GLIBC_TUNABLES", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")
kept = False


def keep_freed_memory() -> bool:
    """Tells glibc's malloc to give nothing back to the system from now on. Returns whether malloc does so.

    By default the large tensors of a step are mapped and unmapped, or the heap is cut, again and again, by thresholds
    that move. A step of DenseNet-22-12 took 4,000 to 9,000 page faults, a tenth of its time, and the next net none.
    The process then holds its peak until it ends.
    Another C library stays as it is, and so do settings of the user's own (the MALLOC_ variables and GLIBC_TUNABLES).

    Source: mallopt(3).
    """
    global kept
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if kept or mallopt is None or any(os.environ.get(name) for name in SETTINGS):
        return kept
    # -1 becomes the largest size_t: the heap is never cut.
    kept = mallopt(M_MMAP_MAX, 0) == 1 and mallopt(M_TRIM_THRESHOLD, -1) == 1
    return kept


def malloc_in_use() -> str:
    """For the conditions of a measurement."""
    given = [f"{name}={os.environ[name]}" for name in SETTINGS if os.environ.get(name)]
    return " ".join(given) or ("freed memory kept (mallopt)" if kept else "default")
