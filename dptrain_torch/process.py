"""What is set for the whole process before torch makes its first array, unless the user has set it."""

from __future__ import annotations

import os

from dptrain.allocator import keep_pages


def prepare() -> None:
    """Fewer page faults: huge pages, and memory that is kept."""
    # torch reads it when it first makes an array of 2 MiB or more; set it to 0 before that to go without huge pages.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    keep_pages()


prepare()
