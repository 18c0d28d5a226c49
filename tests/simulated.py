"""Engines on a simulated clock: real decisions, trees and frames, while every forward takes the time that a test says.

Target and draft run side by side: a drafting step that began before a question came is finished first, and what it
found is there when it ends. The machine's own speed is in none of the numbers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from torch import Tensor

from ssd_runtime.comm.control.messages import Message
from ssd_runtime.config import EngineConfig, SpeculationConfig
from ssd_runtime.draft.drafter import DraftStep
from ssd_runtime.engine import engine as engine_module
from ssd_runtime.leader import draft_state, drafts, link_speculator
from ssd_runtime.model.batch import ForwardBatch
from ssd_runtime.speculation.sampling.ranking import Choice
from ssd_runtime.speculation.types import OutcomeFrame, TreeFrame
from tests.engines import InProcess, SteppedDraft, in_process

TIMED = (engine_module, draft_state, drafts, link_speculator)


class Clock:
    """Stands for the module `time`; its seconds pass when somebody says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def monotonic_ns(self) -> int:
        return round(self.now * 1e9)


@dataclass(frozen=True)
class Costs:
    """Milliseconds of a forward: so much, and so much for each row."""

    verify: float
    verify_row: float
    step: float
    step_row: float

    def verify_seconds(self, rows: int) -> float:
        return (self.verify + self.verify_row * rows) / 1e3

    def step_seconds(self, rows: int) -> float:
        return (self.step + self.step_row * rows) / 1e3


class TimedTarget:
    """A model whose forwards take the time they cost."""

    def __init__(self, model: Any, clock: Clock, costs: Costs) -> None:
        self._model, self._clock, self._costs = model, clock, costs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def forward(self, batch: ForwardBatch, kv_L2SGD: Tensor) -> Tensor:
        self._clock.now += self._costs.verify_seconds(len(batch.tokens_N))
        return self._model.forward(batch, kv_L2SGD)  # type: ignore[no-any-return]

    def choose(self, batch: ForwardBatch, kv_L2SGD: Tensor, choices: Sequence[Choice], first_row: int = 0) -> list[int]:
        self._clock.now += self._costs.verify_seconds(len(batch.tokens_N))
        return self._model.choose(batch, kv_L2SGD, choices, first_row)  # type: ignore[no-any-return]


class TimedDraft(SteppedDraft):
    """A `DraftConnection` that drafts while the target's clock runs, one step after the other."""

    def __init__(self, clock: Clock, costs: Costs, *args: Any) -> None:
        super().__init__(*args)
        self.clock, self.costs = clock, costs
        self.free_at = 0.0  # when its last step ends
        self._arrived: list[tuple[float, OutcomeFrame]] = []
        self._finished: list[tuple[float, TreeFrame]] = []

    def send_control(self, message: Message) -> None:
        self._work_until(self.clock.now)
        self.free_at = max(self.free_at, self.clock.now)
        super().send_control(message)

    def send_outcomes(self, frame: OutcomeFrame) -> None:
        self._work_until(self.clock.now)
        self.frames += [frame] if frame.rows else []
        self._arrived.append((self.clock.now, frame))

    def poll_trees(self) -> list[TreeFrame]:
        self._work_until(self.clock.now)
        heard = [tree for at, tree in self._finished if at <= self.clock.now]
        self._finished = self._finished[len(heard) :]
        return heard

    def wait_trees(self, timeout_s: float) -> list[TreeFrame]:
        until = self.clock.now + timeout_s
        while not self._finished and self._turn(until):
            pass
        next_at = self._finished[0][0] if self._finished else math.inf
        self.clock.now = max(self.clock.now, min(until, next_at))
        return self.poll_trees()

    def _work_until(self, now: float) -> None:
        while self._turn(now):
            pass

    def _turn(self, until: float) -> bool:
        """Take in what has come, or do one step that begins before `until`; False if there is neither."""
        came, frame = self._arrived[0] if self._arrived else (math.inf, None)
        if frame is not None and came <= self.free_at:
            self._arrived.pop(0)
            if self.drafter.advance(frame):
                self._finish()
        elif self.free_at < min(until, came) and (step := self.drafter.grow()) is not None:
            begun, self.free_at = self.free_at, self.free_at + self.costs.step_seconds(step.rows)
            if self.drafter._last_step is not None:
                self.drafter._last_step = DraftStep(round(begun * 1e9), round(self.free_at * 1e9), step.rows)
            self._finish()
        elif came <= until and frame is not None:  # it rested
            self.free_at = came
        else:
            return False
        return True

    def _finish(self) -> None:
        self._finished.append((self.free_at, self.drafter.tree()))


@contextmanager
def simulated(
    costs: Costs, target: Any, draft: Any, engine: EngineConfig, speculation: SpeculationConfig
) -> Iterator[tuple[InProcess, Clock]]:
    """`in_process` with these arguments, and its clock. The clock stands still but for forwards."""
    clock = Clock()
    with ExitStack() as stack:
        for module in TIMED:
            stack.enter_context(mock.patch.object(module, "time", clock))
        timed: Any = TimedTarget(target, clock, costs)
        make_rank = functools.partial(TimedDraft, clock, costs)
        yield in_process(timed, draft, engine, speculation, make_rank=make_rank), clock
