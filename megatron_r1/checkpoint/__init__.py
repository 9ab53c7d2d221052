"""What a run goes on from, and how it is kept.

Prepares megatron-core for the device before any module here imports it.
"""

from megatron_r1.compat import megatron_cpu

megatron_cpu.enable()
