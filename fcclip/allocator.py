"""What glibc does with memory that is given back.

By itself it hands large blocks to the system at once and pays for the next one with page faults, which are a good part
of a network's time on a CPU. No output changes, and a process keeps the memory of its largest moment.
"""

from __future__ import annotations

import ctypes
import os
import sys

VARIABLE = "FCCLIP_MALLOC"  # "default" leaves the allocator as it is
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # names of mallopt
_MOST = 2**31 - 1  # bytes that may lie free at the end of the heap, all that an int of C can say


def keep_freed_memory() -> bool:
    """Makes glibc keep what is freed, for this process.

    Returns:
        Whether it does: not on other systems, where the user set glibc's own variables, or with FCCLIP_MALLOC=default.
    """
    chosen = any(name.startswith("MALLOC_") and name.endswith("_") for name in os.environ)
    chosen = chosen or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if chosen or os.environ.get(VARIABLE) == "default" or not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # not in musl
    return bool(mallopt and mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, _MOST))


def described() -> str:
    """The variables that tell the allocator something, for logs and recorded results."""
    names = sorted(
        name
        for name in os.environ
        if name in (VARIABLE, "GLIBC_TUNABLES", "LD_PRELOAD") or (name.startswith("MALLOC_") and name.endswith("_"))
    )
    return ", ".join(f"{name}={os.environ[name]}" for name in names) or f"{VARIABLE} unset"
