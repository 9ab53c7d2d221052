"""What a run will need before it is started: memory of every rank, time of a step, bytes that move, cost.

Importing this package makes megatron-core usable without CUDA (see `compat.megatron_cpu`), before anything of
megatron-core is loaded.
"""

from megatron_r1.compat import megatron_cpu

megatron_cpu.enable()
