"""[checkpoint] of the verbs that train."""

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from megatron_r1.config.section import Section


class CheckpointSection(Section):
    """[checkpoint]: what a killed run goes on from."""

    every: PositiveInt = 10
    """Steps between checkpoints; the last step always writes one."""
    every_minutes: PositiveFloat | None = None
    """Write one as well when so much time has passed since the last, by the first rank's clock."""
    keep: PositiveInt = 2
    """How many of the newest are kept."""
    keep_every: PositiveInt | None = None
    """Those after a multiple of so many steps are kept for ever, besides the newest."""
    asynchronous: bool = False
    """Copy the state to host memory and write it while training goes on; costs that much memory. Worth it where the
    phase `checkpoint` is long beside a step."""
    grace_seconds: NonNegativeFloat = 25.0
    """After SIGTERM a run finishes its step and saves; if the step takes longer than this, it ends without. Slurm and
    Kubernetes kill 30 s after SIGTERM unless told otherwise. SIGUSR1 has no such limit."""
