"""megatron-r1: take a base model, teach it to reason by reinforcement learning, ship the result.

::

     run.toml ─ config ─┬─ data: questions ──► rollout: vLLM fleet ──► reward ──► advantage ─┐
                        │        corpus               ▲ weights                              ▼
                        └─ model: Megatron-core ── weight_sync ◄── optim ◄── loss ◄── packed batches
                                      ▲                              │
                        checkpoint ◄──┴── HF import/export           └──► report: metrics, samples, HTML

Importing this package imports nothing else; `megatron_r1.cli` is the way in.
"""

__version__ = "0.1.0"
