"""What of a recipe a command is about: `--from` and `--only`, for a run and for a dry one."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_r1.recipe.plan import Plan, Stage
from megatron_r1.recipe.record import read_lineage

ANEW = ".from"
"""Names the stage of a `--from` that has not got to its end: started again, it goes on and does not begin anew."""


@dataclass(frozen=True)
class Choice:
    """What of a recipe is run, and how."""

    anew: str | None = None
    """`--from`: this stage and all that depend on it, whether they have changed or not."""
    only: str | None = None
    """`--only`: no other stage than this."""
    quiet: bool = False
    """Nothing goes to standard output."""

    def stages(self, plan: Plan) -> Sequence[Stage]:
        """Those that are not left out, in order.

        Raises:
            ConfigError: no such stage.
        """
        for name in filter(None, (self.anew, self.only)):
            plan.stage(name)
        return plan.stages if self.only is None else [plan.stage(self.only)]

    def begins_anew(self, plan: Plan) -> Sequence[Stage]:
        """Those of them that run whatever they have; none where an earlier command like this did not get to its end."""
        if self.anew is None or self.goes_on(plan):
            return []
        chosen = self.stages(plan)
        return [stage for stage in plan.depending_on(self.anew) if stage in chosen]

    def goes_on(self, plan: Plan) -> bool:
        """Whether a command like this has begun and did not get to its end."""
        note = plan.output / ANEW
        return note.exists() and note.read_text() == self._text()

    def begin(self, plan: Plan) -> None:
        """Note that this one has begun."""
        (plan.output / ANEW).write_text(self._text())

    def end(self, plan: Plan) -> None:
        """It has got to its end; another stage alone does not end what `--from` began."""
        if self.anew or self.only is None:
            (plan.output / ANEW).unlink(missing_ok=True)

    def unfinished(self, plan: Plan) -> str | None:
        """What is wrong with an `--only` whose needs have no results."""
        if self.only is not None:
            for name in plan.stage(self.only).needs:
                if read_lineage(plan.output / name) is None:
                    return f"--only {self.only}: it needs the stage {name}, which has not finished; run that first"
        return None

    def _text(self) -> str:
        return f"{self.anew} {self.only or ''}\n"
