"""Megatron's optimizer and schedules.

Prepares megatron-core for the device before any module here imports it.
"""

from megatron_r1.compat import megatron_cpu

megatron_cpu.enable()
