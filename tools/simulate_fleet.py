"""A fleet of any size in simulated time: the real scheduler and admission rule, engines and learner that only count.

    python tools/simulate_fleet.py                      # 512 engines, 8,192 samples a step, staleness 0, 1 and 4
    python tools/simulate_fleet.py --sizes=64,128,256,512,1024 --staleness=1     # the scheduler's cost by size
    python tools/simulate_fleet.py --lengths=lengths.csv --json=fleet.json --svg=fleet.svg

An engine runs up to --slots sequences at once, each at the speed that --curve gives a batch of that size. A sequence
takes as many tokens as its response is long; prefill takes no time. A step trains for --train seconds, then the weights
go out for --sync seconds in which engines stand still and keep what they have.

The scheduler's cost is the process time of all calls of `Scheduler` and `Admission`.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from heapq import heappop, heappush
from pathlib import Path
from typing import ParamSpec, TypeVar

from simulated_engine import SimulatedEngine, response_lengths, token_seconds

from megatron_r1.rollout.admission import Admission, Late, Step
from megatron_r1.rollout.scheduler import Key, Scheduler

P = ParamSpec("P")
T = TypeVar("T")
PROMPT_TOKENS = 160
CURVE = "1:60,8:420,16:760,32:1280,64:2000,128:2900"
"""Tokens/s by sequences that run."""


@dataclass(frozen=True)
class Setting:
    """One simulated run."""

    engines: int
    groups: int
    """Of a step."""
    samples: int
    """Of a group."""
    slots: int
    curve: tuple[tuple[float, float], ...]
    lengths: str
    max_tokens: int
    train: float
    sync: float
    staleness: int
    steps: int
    late: Late
    seed: int

    @property
    def warmup(self) -> int:
        """Steps before the figures count: the pipeline fills."""
        return min(self.staleness + 2, self.steps // 2)


@dataclass
class Outcome:
    """Figures of the steps after the warm-up; shares of their time."""

    engines: int
    staleness: int
    step_seconds: float
    engine_idle: float
    """Of all engines, no sequence running."""
    sequences: float
    """Running on an engine, on average."""
    tokens_per_second: float
    """Of the fleet."""
    learner_idle: float
    """It neither trains nor sends weights."""
    histogram: dict[int, float]
    """Share of groups by staleness."""
    dropped: int
    requests: int
    """Of the whole run, as the next two."""
    scheduler_seconds: float
    microseconds: float
    """Of the scheduler's CPU time, a request."""


@dataclass(order=True)
class Event:
    """Something that happens at a time."""

    time: float
    number: int
    act: Callable[[], None] = field(compare=False)


class Simulation:
    """A run: events in order of time."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.chance = random.Random(setting.seed)
        self.draw = response_lengths(setting.lengths, setting.max_tokens)
        self.scheduler = Scheduler(group_size=setting.samples, reserve=setting.samples)
        self.admission = Admission(setting.groups, setting.staleness, setting.late)
        seconds = token_seconds(setting.curve, setting.slots)
        self.fleet = {f"engine-{number}": SimulatedEngine(setting.slots, seconds) for number in range(setting.engines)}
        self.lengths: dict[Key, list[int]] = {}
        self.events: list[Event] = []
        self.now = self.cpu = self.tokens = self.trained_seconds = 0.0
        self.numbers = self.groups = self.requests = 0
        self.learning = False
        self.marks: list[tuple[float, ...]] = []
        """After each step: time, engine seconds with work, sequence seconds, tokens, learner seconds."""
        for name in self.fleet:
            self.measured(self.scheduler.joined, name, setting.slots)

    def run(self) -> Outcome:
        """All steps."""
        self.feed()
        while len(self.marks) < self.setting.steps:
            event = heappop(self.events)
            self.now = event.time
            event.act()
        return self.outcome()

    def measured(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """A call whose CPU time counts as the scheduler's."""
        start = time.process_time()
        answer = call(*args, **kwargs)
        self.cpu += time.process_time() - start
        return answer

    def at(self, moment: float, act: Callable[[], None]) -> None:
        self.numbers += 1
        heappush(self.events, Event(moment, self.numbers, act))

    def feed(self) -> None:
        """Begin as many groups as may begin, and send what has a place."""
        for _ in range(self.measured(lambda: self.admission.room)):
            key = self.groups
            self.groups += 1
            self.lengths[key] = self.draw(self.chance, self.setting.samples)
            at_least = self.measured(self.admission.begin, key)
            self.measured(
                self.scheduler.submit, key, PROMPT_TOKENS, self.setting.samples, self.setting.max_tokens, at_least
            )
        self.dispatch()

    def dispatch(self) -> None:
        for one in self.measured(self.scheduler.assign):
            self.measured(self.admission.sent, one.key, self.scheduler.engines[one.engine].version)
            engine = self.fleet[one.engine]
            engine.advance(self.now)
            engine.add(one, self.lengths[one.key])
            self.expect(one.engine)

    def expect(self, name: str) -> None:
        """Plan the next end of a sequence on an engine, in place of what was planned."""
        engine = self.fleet[name]
        engine.stamp += 1
        moment, stamp = engine.next_end(), engine.stamp
        if moment is not None:
            self.at(moment, lambda: self.ended(name) if engine.stamp == stamp else None)

    def ended(self, name: str) -> None:
        engine = self.fleet[name]
        engine.advance(self.now)
        key, sample, length = engine.pop()
        self.tokens += length
        self.requests += 1
        if self.measured(self.scheduler.finished, name, key, sample, length) == "complete":
            del self.lengths[key]
            self.measured(self.admission.finished, key)
            self.learn()
        self.dispatch()
        self.expect(name)

    def learn(self) -> None:
        step = None if self.learning else self.measured(self.admission.take)
        if step:
            self.learning = True
            self.forget(step)
            self.at(self.now + self.setting.train, self.send_weights)
            if step.dropped:
                self.feed()

    def forget(self, step: Step) -> None:
        for key in step.dropped:
            name = self.measured(self.scheduler.cancel, key)
            self.lengths.pop(key, None)
            if name is not None:
                self.fleet[name].advance(self.now)
                self.fleet[name].drop(key)
                self.expect(name)

    def send_weights(self) -> None:
        """Engines stand still and keep their sequences until the weights are there."""
        for name, engine in self.fleet.items():
            self.measured(self.scheduler.hold, name)
            engine.advance(self.now)
            engine.stands = True
            self.expect(name)
        self.at(self.now + self.setting.sync, self.updated)

    def updated(self) -> None:
        version = self.admission.step
        self.measured(self.admission.published, version)
        for name, engine in self.fleet.items():
            self.measured(self.scheduler.release, name, version)
            engine.advance(self.now)
            engine.stands = False
            self.expect(name)
        self.trained_seconds += self.setting.train + self.setting.sync
        busy, occupied = (sum(getattr(engine, name) for engine in self.fleet.values()) for name in ("busy", "occupied"))
        self.marks.append((self.now, busy, occupied, self.tokens, self.trained_seconds))
        self.learning = False
        self.feed()
        self.learn()

    def outcome(self) -> Outcome:
        setting = self.setting
        first, last = self.marks[setting.warmup - 1], self.marks[-1]
        seconds, busy, occupied, tokens, learner = (end - start for start, end in zip(first, last, strict=True))
        total = self.admission.staleness.total()
        return Outcome(
            engines=setting.engines,
            staleness=setting.staleness,
            step_seconds=seconds / (setting.steps - setting.warmup),
            engine_idle=1 - busy / (seconds * setting.engines),
            sequences=occupied / (seconds * setting.engines),
            tokens_per_second=tokens / seconds,
            learner_idle=1 - learner / seconds,
            histogram={age: count / total for age, count in sorted(self.admission.staleness.items())},
            dropped=self.admission.dropped,
            requests=self.requests,
            scheduler_seconds=self.cpu,
            microseconds=self.cpu / self.requests * 1e6,
        )


def table(outcomes: Sequence[Outcome]) -> str:
    """Markdown."""
    head = (
        "engines",
        "staleness allowed",
        "step, s",
        "engines idle",
        "sequences an engine",
        "tokens/s",
        "learner idle",
    )
    rows = [(*head, "groups by staleness", "dropped", "scheduler, µs a request", "of a core at 1,000/s")]
    for one in outcomes:
        ages = ", ".join(f"{age}: {share:.0%}" for age, share in one.histogram.items())
        rows.append(
            (
                *(str(one.engines), str(one.staleness), f"{one.step_seconds:.0f}", f"{one.engine_idle:.1%}"),
                *(f"{one.sequences:.1f}", f"{one.tokens_per_second:,.0f}", f"{one.learner_idle:.1%}"),
                *(ages, str(one.dropped), f"{one.microseconds:.1f}", f"{one.microseconds / 1e3:.1%}"),
            )
        )
    lines = [rows[0], ("---:",) * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def chart(outcomes: Sequence[Outcome]) -> str:
    """SVG: idle shares as bars, the time of a step beside them."""
    width, row, left, scale = 720, 62, 150, 4.2
    height = 70 + row * len(outcomes)
    texts = 'font-family="system-ui, sans-serif" font-size="13"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" {texts} fill="#14171f">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for colour, x, text in (("#3b5bdb", left, "engines idle"), ("#e8590c", left + 120, "learner idle")):
        parts += [f'<rect x="{x}" y="16" width="12" height="12" rx="2" fill="{colour}"/>']
        parts += [f'<text x="{x + 18}" y="27">{text}</text>']
    for number, one in enumerate(outcomes):
        top = 48 + row * number
        parts += [f'<text x="16" y="{top + 18}" font-weight="600">staleness {one.staleness}</text>']
        parts += [f'<text x="16" y="{top + 37}" fill="#626a7a">{one.step_seconds:.0f} s a step</text>']
        for line, (colour, share) in enumerate((("#3b5bdb", one.engine_idle), ("#e8590c", one.learner_idle))):
            y, length = top + 4 + 20 * line, max(1.0, 100 * share * scale)
            parts += [f'<rect x="{left}" y="{y}" width="{length:.1f}" height="16" rx="2" fill="{colour}"/>']
            parts += [f'<text x="{left + length + 6:.1f}" y="{y + 13}">{share:.1%}</text>']
    return "\n".join([*parts, "</svg>"]) + "\n"


def settings(args: argparse.Namespace) -> list[Setting]:
    """A run for each fleet size and staleness; larger fleets get more groups."""
    return [
        Setting(
            engines=engines,
            groups=max(1, round(args.groups * engines / args.engines)),
            staleness=staleness,
            curve=args.curve,
            **{name: getattr(args, name) for name in ("samples", "slots", "lengths", "max_tokens", "train", "sync")},
            **{name: getattr(args, name) for name in ("steps", "late", "seed")},
        )
        for engines in args.sizes or [args.engines]
        for staleness in args.staleness
    ]


def at_least(least: float, kind: Callable[[str], T]) -> Callable[[str], T]:
    """The type of an option: a number from `least` on."""

    def read(text: str) -> T:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
        if not least <= float(text) < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not {least:g} or more")
        return value

    return read


def numbers(least: int) -> Callable[[str], list[int]]:
    """The type of an option: numbers from `least` on, between commas."""
    one = at_least(least, int)
    return lambda text: [one(part) for part in text.split(",")]


def speeds(text: str) -> tuple[tuple[float, float], ...]:
    """The type of --curve."""
    points = [tuple(map(at_least(0.001, float), point.split(":"))) for point in text.split(",")]
    if any(len(point) != 2 for point in points):
        raise argparse.ArgumentTypeError(f"{text!r} is not sequences:tokens/s, between commas")
    return tuple(sorted((batch, speed) for batch, speed in points))


def lengths(text: str) -> str:
    """The type of --lengths: what `response_lengths` can draw from."""
    try:
        response_lengths(text, 1)(random.Random(0), 1)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot read {text}: {error.strerror}") from None
    except (ValueError, LookupError, TypeError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not constant:N, lognormal:MEDIAN:SIGMA:CORRELATION (of 0 to 1) or a file of lengths"
        ) from None
    return text


def parser() -> argparse.ArgumentParser:
    parser, count = argparse.ArgumentParser(description="The rollout fleet in simulated time."), at_least(1, int)
    parser.add_argument("--engines", type=count, default=512)
    parser.add_argument("--sizes", type=numbers(1), help="fleet sizes, each with its share of --groups: 64,128,256")
    parser.add_argument("--groups", type=count, default=512, help="of a step")
    parser.add_argument("--samples", type=count, default=16, help="of a group")
    parser.add_argument("--slots", type=count, default=64, help="sequences that an engine runs at once")
    parser.add_argument("--curve", type=speeds, default=CURVE, help="sequences:tokens/s, ...")
    parser.add_argument("--lengths", type=lengths, default="lognormal:5000:1:0.5", help=response_lengths.__doc__)
    parser.add_argument("--max-tokens", type=count, default=32_768)
    parser.add_argument("--train", type=at_least(0, float), default=120.0, help="seconds of a step")
    parser.add_argument("--sync", type=at_least(0, float), default=10.0, help="seconds in which new weights go out")
    parser.add_argument("--staleness", type=numbers(0), default="0,1,4")
    parser.add_argument("--late", choices=("wait", "drop", "keep"), default="wait")
    parser.add_argument("--steps", type=at_least(2, int), default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--svg", type=Path, help="write a chart there")
    return parser


def main() -> int:
    """Returns the exit code."""
    args = parser().parse_args()
    outcomes = [Simulation(setting).run() for setting in settings(args)]
    print(table(outcomes))
    if args.json:
        args.json.write_text(json.dumps([asdict(one) for one in outcomes], indent=1) + "\n")
    if args.svg:
        args.svg.write_text(chart(outcomes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
