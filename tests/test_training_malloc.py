"""A step's freed memory serves the next one; each in a process of its own, since the setting is the process's."""

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from freezeout_ext.training.malloc import keep_freed_memory, malloc_in_use

torch.set_num_threads(1)
print(keep_freed_memory(), malloc_in_use(), sep=";")

def step():
    tensors = [torch.ones(n) for n in (10_000_000, 50_000, 3_000_000)]  # 40 MB: beyond what malloc keeps by itself
    return sum(float(t[-1]) for t in tensors)

for _ in range(10):  # the heap grows until every size has its place
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(**settings):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=300,
        env={**environment, **settings},
    )  # fmt: skip
    said, faults = done.stdout.splitlines()
    return said, int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_later_steps_fault_no_pages_in():
    said, faults = run()
    assert said == "True;freed memory kept (mallopt)"
    # 5 steps of 52 MB; huge pages would be 25 of 2 MiB each.
    assert faults < 20


def test_a_setting_of_the_users_stays():
    said, faults = run(MALLOC_TRIM_THRESHOLD_="131072")
    assert said == "False;MALLOC_TRIM_THRESHOLD_=131072"
    assert faults > 20
