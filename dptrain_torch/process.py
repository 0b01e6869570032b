"""What is set for the whole process before the framework makes its first array: what becomes of the memory of freed ones.

A private step makes many more arrays than a plain one, and frees them at its end. New pages from the system, with their zeros, took up to a
sixth of a step: huge pages are fewer, and glibc is told to keep what it has and to serve arrays up to 32 MiB from it. The process then
stays as large as it was at its peak.

Arrays above 32 MiB, of wide networks and large batches, get pages of their own all the same, anew in each step. ``keep_large`` ends
that too. Between large arrays that come and go some memory is lost (0 to 17 % of a process), so a run that prefers memory goes without.
"""

from __future__ import annotations

import ctypes
import os
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4  # names of <malloc.h>
KEPT, LARGEST = 2**31 - 1, 32 * 2**20  # bytes: free memory at which glibc gives some back; arrays that get pages of their own
OWN_PAGES = 65536  # arrays that may have pages of their own at once, unless it is set
# Whoever sets one of these has decided.
SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES")


def adjust(*settings: tuple[int, int]) -> bool:
    """Set parameters of glibc's allocator, unless the environment says otherwise.

    Args:
        settings: parameter of ``mallopt`` and value.
    Returns:
        Whether it took them all.
    """
    if not sys.platform.startswith("linux") or any(name in os.environ for name in SETTINGS):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another libc
        return False
    taken = [mallopt(parameter, value) for parameter, value in settings]
    return all(taken)


def keep_pages() -> bool:
    """Let arrays that are freed serve the next step.

    Returns:
        Whether glibc keeps them.
    """
    # torch reads it when it first makes an array of 2 MiB or more; set it to 0 before that to go without huge pages.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    return adjust((TRIM_THRESHOLD, KEPT), (MMAP_THRESHOLD, LARGEST))


def keep_large(wanted: bool) -> bool:
    """Let arrays above 32 MiB serve the next step too, from now on.

    Args:
        wanted: False gives them pages of their own again.
    Returns:
        Whether glibc does so.
    """
    return adjust((MMAP_MAX, 0 if wanted else OWN_PAGES))


keep_pages()
