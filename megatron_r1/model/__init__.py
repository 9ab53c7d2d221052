"""Megatron-core's GPTModel from a Hugging Face config, and everything that knows tensor names.

Importing this package prepares megatron-core for the device at hand (`compat.megatron_cpu`), so it comes
before any import of megatron.
"""

from megatron_r1.compat import megatron_cpu

megatron_cpu.enable()
