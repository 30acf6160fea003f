"""How a process computes: blocks on a CPU, and freed memory that is kept for the next block."""

import resource
import subprocess
import sys

import pytest
import torch

from raydc.core.process import block_rows, release_memory

FAULTS = """
import resource, sys
import torch
from raydc.core.process import prepare_process
if sys.argv[1] == "prepared":
    prepare_process(1)
def block():
    return [torch.ones(2**21) for _ in range(6)]
block()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    block()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_a_cpu_takes_small_blocks_and_no_more_than_was_asked():
    assert block_rows(torch.device("cpu"), 8192) == 1024
    assert block_rows(torch.device("cpu"), 100) == 100
    assert block_rows(torch.device("cuda"), 8192) == 8192


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_the_memory_of_a_block_serves_the_next_one():
    def faults(how):
        done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
        return int(done.stdout)

    # 48 MiB in each of 20 blocks: 12,288 pages, each of which the system clears again if it was given back.
    pages = 48 * 2**20 // resource.getpagesize()
    assert faults("prepared") < 3 * pages


def test_memory_can_be_given_back_at_any_time():
    x = torch.ones(2**20)
    release_memory()
    assert float(x.sum()) == 2**20
