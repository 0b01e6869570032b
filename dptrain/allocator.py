"""What becomes of the memory of freed arrays, on Linux with glibc: kept for the next step, which makes the same arrays again.

A private step makes many more arrays than a plain one, and frees them at its end. New pages from the system come with their zeros, which
took up to a sixth of a step on a virtual machine. Nothing here touches a guarantee.
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
    """Let arrays up to 32 MiB that are freed serve the next step; the process then stays as large as it was at its peak.

    Returns:
        Whether glibc keeps them.
    """
    return adjust((TRIM_THRESHOLD, KEPT), (MMAP_THRESHOLD, LARGEST))


def keep_large(wanted: bool) -> bool:
    """Let arrays above 32 MiB serve the next step too, from now on.

    Between large arrays that come and go some memory is lost: up to 17 % of a process, 8 % in the median of six networks.

    Args:
        wanted: False gives them pages of their own again.
    Returns:
        Whether glibc does so.
    """
    return adjust((MMAP_MAX, 0 if wanted else OWN_PAGES))
