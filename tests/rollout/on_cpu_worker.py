"""Imported by a vLLM worker of the tests: `on_cpu.py`'s stand-ins, and our receiver."""

from megatron_r1.rollout import receiver
from tests.rollout import on_cpu

on_cpu.install(setattr)


class Receiver(receiver.Receiver):
    """What the worker is told to mix in."""
