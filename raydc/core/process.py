"""How a process computes: its threads, its memory, the rows it works on at once."""

import ctypes
import os
from typing import Any

import torch

# torch before faiss: the other order gives the two libraries separate thread settings.
import faiss  # isort: skip

_CPU_BLOCK_ROWS = 1024
"""Rows put through a network at once on a CPU."""

_KERNELS = "16384"
"""Kernels that oneDNN keeps."""

_MALLOC = {-1: 128 * 2**20, -2: 8 * 2**20, -3: 12 * 2**20}
"""mallopt's M_TRIM_THRESHOLD, M_TOP_PAD and M_MMAP_THRESHOLD (malloc.h): bytes above which freed memory at the end of
the heap is given back, of which the heap grows at once, and from which a piece has memory of its own."""


def prepare_process(num_threads: int) -> None:
    """Let torch and FAISS compute on this many threads, and treat denormal numbers as zero, in the present process.

    Late in training the moments of the optimizer and the small gradients of the KL become denormal, which a CPU
    multiplies up to a hundred times slower; as numbers below 1e-38 they carry nothing.

    What a step or a block of rows frees, the next one takes again: given back to the system each time, its pages cost
    more time than the arithmetic on them.

    oneDNN compiles a kernel for each layer and number of rows. Its cache of 1024 is too small for the layers of two
    networks and the sizes of all their batches, which would be compiled anew again and again.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", _KERNELS)
    _keep_freed_memory()
    torch.set_flush_denormal(True)
    torch.set_num_threads(num_threads)
    faiss.omp_set_num_threads(num_threads)


def _libc() -> Any:
    return ctypes.CDLL(None)


def _keep_freed_memory() -> None:
    # Settings of glibc's malloc, which other systems do not have; those of the environment stay.
    mallopt = getattr(_libc(), "mallopt", None)
    if mallopt is not None and not any(name.startswith("MALLOC_") for name in os.environ):
        for option, size in _MALLOC.items():
            mallopt(option, size)


def block_rows(device: torch.device, most: int) -> int:
    """Return how many rows to put through a network at once, at most `most`.

    On a CPU 1024 are as fast as any number, and the memory of one block serves the next one.
    """
    return min(most, _CPU_BLOCK_ROWS) if device.type == "cpu" else most


def release_memory() -> None:
    """Give freed memory back to the system, between two phases that need it in other sizes."""
    trim = getattr(_libc(), "malloc_trim", None)
    if trim is not None:
        trim(0)
