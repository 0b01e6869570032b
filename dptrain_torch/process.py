"""What is set for the whole process before the framework makes its first array: what becomes of the memory of freed ones.

A private step makes many more arrays than a plain one, and frees them at its end. New pages from the system, with their zeros, took up to a
sixth of a step: huge pages are fewer, and glibc is told to keep what it has and to serve arrays up to 32 MiB from it. The process then
stays as large as it was at its peak.
"""

from __future__ import annotations

import ctypes
import os
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # names of <malloc.h>
KEPT, LARGEST = 2**31 - 1, 32 * 2**20  # bytes: free memory at which glibc gives some back; arrays that get pages of their own
# Whoever sets one of these has decided.
SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_pages() -> bool:
    """Let arrays that are freed serve the next step, unless the environment says otherwise.

    Returns:
        Whether glibc keeps them.
    """
    # torch reads it when it first makes an array of 2 MiB or more; set it to 0 before that to go without huge pages.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if not sys.platform.startswith("linux") or any(name in os.environ for name in SETTINGS):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another libc
        return False
    return bool(mallopt(TRIM_THRESHOLD, KEPT)) and bool(mallopt(MMAP_THRESHOLD, LARGEST))


keep_pages()
