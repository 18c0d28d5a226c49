"""Engines in one process: a real target, a real drafter, real frames, and a draft that is as fast as the test says."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from ssd_runtime.comm.control.codec import decode, encode
from ssd_runtime.comm.control.draft_messages import Admit, Finish, Portion
from ssd_runtime.comm.control.messages import Message
from ssd_runtime.comm.link.frames import OutcomeCodec, TreeCodec
from ssd_runtime.comm.protocol import FrameShape
from ssd_runtime.config import EngineConfig, SpeculationConfig
from ssd_runtime.draft.colocated import ColocatedSpeculator
from ssd_runtime.draft.drafter import Drafter
from ssd_runtime.engine.engine import Engine
from ssd_runtime.engine.request import Request
from ssd_runtime.engine.sequence import Delta, Sequence, TextStream
from ssd_runtime.engine.speculator import NoSpeculation
from ssd_runtime.errors import PeerLost
from ssd_runtime.leader.draft_peer import DraftPeer
from ssd_runtime.leader.drafts import Drafts
from ssd_runtime.leader.link_speculator import LinkSpeculator
from ssd_runtime.model.decoder import Decoder
from ssd_runtime.speculation.planning.cost_model import CostModel
from ssd_runtime.speculation.planning.planner import FixedPlanner, Planner
from ssd_runtime.speculation.types import OutcomeFrame, SamplingParams, TreeFrame
from ssd_runtime.trace import Tracer


class SteppedDraft(DraftPeer):
    """A `DraftPeer` whose drafter takes `steps()` steps a verification, and as many as it is waited for.

    Messages and frames go through their codecs, so whatever cannot travel fails here.

    Attributes:
        told: every message it got.
        frames: every frame it got that had rows.
    """

    def __init__(self, drafter: Drafter, shape: FrameShape, steps: Callable[[], int]) -> None:
        super().__init__(None, b"", 1, None)  # type: ignore[arg-type]
        self.drafter = drafter
        self.dead = False
        self._outcomes, self._trees = OutcomeCodec(shape), TreeCodec(shape)
        self.shape, self.steps = shape, steps
        self._pushed: list[TreeFrame] = []
        self.told: list[Message] = []
        self.frames: list[OutcomeFrame] = []

    @property
    def admitted(self) -> list[int]:
        """The sequences it was told of, in order."""
        return [message.sequence_id for message in self.told if isinstance(message, Admit)]

    def send_control(self, message: Message) -> None:
        self._raise_if_dead()
        self.control_seq += 1
        arrived = decode(encode(message))
        self.told.append(arrived)
        if isinstance(arrived, Admit):
            self.drafter.admit(arrived)
        elif isinstance(arrived, Portion):
            self.drafter.portion(arrived.sequence_id, arrived.index, arrived.count)
        else:
            assert isinstance(arrived, Finish)
            self.drafter.finish(arrived.sequence_id)

    def send_outcomes(self, frame: OutcomeFrame) -> None:
        self._raise_if_dead()
        arrived = self._outcomes.decode(self._outcomes.encode(frame))
        assert arrived == frame
        self.frames += [arrived] if arrived.rows else []
        if self.drafter.advance(arrived):
            self._push()
        for _ in range(self.steps()):
            self._grow()

    def poll_trees(self) -> list[TreeFrame]:
        self._raise_if_dead()
        pushed, self._pushed = self._pushed, []
        return pushed

    def wait_trees(self, timeout_s: float) -> list[TreeFrame]:
        if not self._pushed and not self._grow():
            raise PeerLost("draft", 1, -1, "asked to wait for a draft that has nothing left to draft")
        return self.poll_trees()

    def check_pulse(self, now: float) -> None:
        self._raise_if_dead()

    def _grow(self) -> bool:
        if self.drafter.grow() is None:
            return False
        self._push()
        return True

    def _push(self) -> None:
        tree = self.drafter.tree()
        arrived = self._trees.decode(self._trees.encode(tree))
        assert arrived == tree
        self._pushed.append(arrived)

    def _raise_if_dead(self) -> None:
        if self.dead:
            raise PeerLost("draft", 1, -1, "killed by the test")


class Comings:
    """A `DraftAcceptor` through which the test sends drafts."""

    has_news = True

    def __init__(self) -> None:
        self.waiting: list[SteppedDraft] = []
        self.gone: list[SteppedDraft] = []

    def arrived(self) -> list[SteppedDraft]:
        arrived, self.waiting = self.waiting, []
        return arrived

    def let_go(self, draft: SteppedDraft) -> None:
        self.gone.append(draft)


@dataclass
class InProcess:
    """An engine with every mode."""

    engine: Engine
    draft: SteppedDraft
    colocated: Drafter
    link: LinkSpeculator
    comings: Comings
    helpers: list[SteppedDraft] = field(default_factory=list)
    deltas: dict[str, list[Delta]] = field(default_factory=dict)

    def run(self, requests: list[Request], text: Callable[[], TextStream] | None = None) -> list[Sequence]:
        """Serve all requests at once, to their ends."""
        sequences = [self.engine.add(request, text() if text else None) for request in requests]
        while self.engine.has_work:
            for progressed in self.engine.step():
                request_id = progressed.sequence.request.request_id
                self.deltas.setdefault(request_id, []).append(progressed.delta)
        return sequences

    @property
    def drafts(self) -> list[SteppedDraft]:
        """All that were there from the beginning or came back."""
        return [self.draft, *self.helpers]

    def send_in(self) -> SteppedDraft:
        """One more draft, like the first; it is let in before the next round."""
        like = self.draft
        drafter = Drafter(like.drafter._decoder, like.drafter._engine, like.drafter._speculation)
        self.helpers.append(SteppedDraft(drafter, like.shape, like.steps))
        self.comings.waiting.append(self.helpers[-1])
        return self.helpers[-1]

    def drop_draft(self) -> None:
        """Kill the draft; noticed when it is needed next."""
        self.draft.dead = True

    def bring_draft_back(self) -> None:
        """Its process starts again, empty."""
        self.draft.drafter.reset()
        self.draft = SteppedDraft(self.draft.drafter, self.draft.shape, self.draft.steps)
        self.comings.waiting.append(self.draft)

    def assert_all_blocks_are_back(self) -> None:
        for allocator in (self.engine.allocator, self.draft.drafter.allocator, self.colocated.allocator):
            assert allocator.num_free == allocator.num_blocks
            assert all(allocator.references(block) == 0 for block in range(allocator.num_blocks))


def in_process(
    target: Decoder,
    draft: Decoder,
    engine: EngineConfig | None = None,
    speculation: SpeculationConfig | None = None,
    steps: Callable[[], int] | int = 3,
    planner: Planner | None = None,
    num_drafts: int = 1,
    make_rank: Callable[[Drafter, FrameShape, Callable[[], int]], SteppedDraft] = SteppedDraft,
) -> InProcess:
    """Build one. `steps` is how many drafting steps fit into one verification; K and B are fixed without a planner."""
    engine, speculation = engine or EngineConfig(max_model_len=256), speculation or SpeculationConfig()
    shape = FrameShape.of(
        engine.max_num_seqs, max(1, speculation.lookahead), speculation.budget, speculation.sent_probabilities
    )
    count = steps if callable(steps) else lambda: steps
    rank = make_rank(Drafter(draft, engine, speculation), shape, count)
    comings = Comings()
    comings.waiting.append(rank)
    drafts = Drafts(comings, deadline=5.0)  # type: ignore[arg-type]
    planner = planner or FixedPlanner(speculation.lookahead, speculation.budget)
    link = LinkSpeculator(drafts, speculation.backup, target.arch.vocab_size, CostModel(), planner)
    colocated = Drafter(draft, engine, speculation)
    speculators = {
        "ar": NoSpeculation(),
        "sd": link,
        "ssd": link,
        "sd-colocated": ColocatedSpeculator(colocated),
    }
    tracer = Tracer("test", enabled=False)
    process = InProcess(
        Engine.on(target, engine, speculation.lookahead, speculators, tracer, speculation.coupling),  # type: ignore[arg-type]
        rank,
        colocated,
        link,
        comings,
    )
    for _ in range(num_drafts - 1):
        process.send_in()
    link.check()
    return process


def random_steps(seed: int, most: int = 8) -> Callable[[], int]:
    """A draft whose speed varies from round to round."""
    generator = random.Random(seed)
    return lambda: generator.randint(0, most)


def request(
    prompt: tuple[int, ...], mode: str = "ssd", *, lookahead: int = 3, max_tokens: int = 40, **changes: object
) -> Request:
    """A request with short names for what tests vary; `params` by keyword."""
    params = changes.pop("params", SamplingParams())
    name = changes.pop("request_id", f"{mode}-{len(prompt)}-{hash(prompt)}")
    return Request(name, prompt, params, mode, lookahead, max_tokens, **changes)  # type: ignore[arg-type]
