"""Memory that is kept is not cleared again: the kernel counts the pages that it hands out."""

import subprocess
import sys

PROGRAM = """
import resource, sys
from megatron_r1.convert.heap import keep_freed_memory

def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = bytearray(2**26)
    block[:: 2**12] = b"x" * 2**14
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if sys.argv[1] == "kept":
    keep_freed_memory(2**28)
first = pages()
print(sum(pages() for _ in range(4)) < first)
"""


def run(mode: str) -> str:
    done = subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_freed_memory_is_used_again() -> None:
    assert run("kept") == "True"
    assert run("as it comes") == "False"
