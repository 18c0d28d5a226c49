"""Who reads messages and frames of strangers, small and in this process: a leader, a draft, an engine beside a liar."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ssd_runtime.comm.control.client_messages import Cancel, ChatMessage, Generate
from ssd_runtime.comm.control.draft_messages import Admit
from ssd_runtime.comm.control.messages import Message, Shutdown
from ssd_runtime.comm.link.frames import OutcomeCodec, TreeCodec
from ssd_runtime.comm.protocol import FrameShape, ProtocolError
from ssd_runtime.config import Config, EngineConfig, SpeculationConfig
from ssd_runtime.draft.drafter import Drafter
from ssd_runtime.errors import PeerLost
from ssd_runtime.leader.leader import Leader, Stop
from ssd_runtime.model.text.tokenizer import Tokenizer
from ssd_runtime.speculation.cache import SpeculationCache
from ssd_runtime.speculation.planning.planner import AdaptivePlanner
from ssd_runtime.speculation.types import (
    Branch,
    Outcome,
    OutcomeFrame,
    OutcomeRow,
    SamplingParams,
    Source,
    TreeFrame,
)
from tests.engines import InProcess, SteppedDraft, in_process, request
from tests.tabular import TabularModel

VOCAB = 300
ENGINE = EngineConfig(max_model_len=48, max_num_seqs=3, block_size=8, prefill_chunk=16)
SPECULATION = SpeculationConfig(lookahead=3, budget=4)
SHAPE = FrameShape.of(ENGINE.max_num_seqs, SPECULATION.lookahead, SPECULATION.budget)
SERVED = 40  # polls after which a leader's clients cancel what they asked for

PLAUSIBLE = (
    Generate("a", prompt="the fox", max_tokens=6, stop=("dog",), logprobs=2),
    Generate(
        "b", token_ids=(1, 2, 3), params=SamplingParams(temperature=0.7, top_k=4, top_p=0.9, seed=3), max_tokens=9
    ),
    Generate("c", messages=(ChatMessage("user", "lazy dog"),), max_tokens=4, n=2, stream=False),
    Generate("d", token_ids=(5,), params=SamplingParams(repetition_penalty=1.2, logit_bias=((7, 2.0), (8, -2.0)))),
    Generate("e", token_ids=(9, 9), params=SamplingParams(allowed_tokens=(4, 5, 6), banned_tokens=(4,), min_tokens=2)),
    Generate("f", prompt="over", mode="sd", lookahead=2, max_tokens=8, ignore_eos=True),
)


def _tabular(seed: int) -> TabularModel:
    table_VV = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed))
    return TabularModel(table_VV.expand(VOCAB, VOCAB, VOCAB))


def _engine(**changes: Any) -> InProcess:
    process = in_process(_tabular(1), _tabular(2), ENGINE, SPECULATION, **changes)  # type: ignore[arg-type]
    process.link._planner = AdaptivePlanner(SPECULATION.lookahead, SPECULATION.budget, process.link._costs)
    return process


class _Socket:
    """Brings a leader some messages, then cancels, then ends it once nothing is left."""

    def __init__(self, messages: Sequence[Message], process: InProcess, stop: Stop) -> None:
        self._messages, self._process, self._stop = list(messages), process, stop
        self._ids = {message.request_id for message in messages if isinstance(message, Generate)}
        self._polls = 0

    def poll(self, timeout_s: float) -> list[tuple[bytes, Message]]:
        self._polls += 1
        arriving, self._messages = self._messages[:8], self._messages[8:]
        if not arriving and self._polls % SERVED == 0:
            arriving = [Cancel(request_id) for request_id in self._ids]
        elif not arriving and not self._process.engine.has_work:
            self._stop.reason = "done"
        return [(b"client", message) for message in arriving]

    def send(self, identity: bytes, message: Message) -> bool:
        return True

    def alive(self, identity: bytes) -> bool:
        return True

    def is_local(self, identity: bytes) -> bool:
        return True


class Front:
    """A leader, which gets decoded messages in batches."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._process = _engine()

    def take(self, messages: Sequence[Message]) -> None:
        """Serve all of them; what they held is given back."""
        stop = Stop()
        socket: Any = _Socket([one for one in messages if not isinstance(one, Shutdown)], self._process, stop)
        config = Config(engine=ENGINE, speculation=SPECULATION)
        Leader(config, self._process.engine, self._tokenizer, socket, self._process.link, None, {}, stop, key="").run()
        self._process.assert_all_blocks_are_back()
        self._process.draft.told.clear()
        self._process.draft.frames.clear()


class Draft:
    """A draft rank's model and trees, which get outcome frames."""

    def __init__(self) -> None:
        self._drafter = Drafter(_tabular(2), ENGINE, SPECULATION)  # type: ignore[arg-type]
        self._turn = 0

    def frame(self, chance: random.Random) -> OutcomeFrame:
        """One that could come next."""
        rows = []
        for sequence in self._drafter._sequences.values():
            tree = sequence.tree
            turn = tree.turn + 1 if tree.trunk is not None else tree.turn
            outcome = Outcome(chance.randrange(len(tree.trunk or ()) + 1), chance.randrange(VOCAB))
            length = chance.randrange(SPECULATION.lookahead + 1)
            tokens = tuple(chance.randrange(VOCAB) for _ in range(length))
            source = chance.choice((Source.NONE, Source.DRAFT, Source.NGRAM, Source.PENDING))
            length, tokens = (0, ()) if source in (Source.NONE, Source.PENDING) else (length, tokens)
            rows.append(OutcomeRow(sequence.sequence_id, turn, outcome, source, length, tokens))
        return OutcomeFrame(self._turn, 0, tuple(rows))

    def take(self, frame: OutcomeFrame) -> None:
        """As the loop of a draft does: an outcome that cannot be ends the link, and the draft begins anew."""
        try:
            self._turn = frame.round
            self._drafter.advance(frame)
            self._drafter.grow()
            TreeCodec(SHAPE).encode(self._drafter.tree())
        except ProtocolError:
            self.begin()

    def begin(self) -> None:
        """Another link: three sequences."""
        self._drafter.reset()
        for number in range(ENGINE.max_num_seqs):
            mode = "sd" if number == 2 else "ssd"
            params = SamplingParams(temperature=0.5 * number, seed=number)
            self._drafter.admit(Admit(number, (1, 2, 3 + number), params, mode, SPECULATION.lookahead, 200))  # type: ignore[arg-type]


class _Liar(SteppedDraft):
    """A draft whose trees are what the test says, besides its own."""

    lies: ClassVar[list[TreeFrame]] = []

    def poll_trees(self) -> list[TreeFrame]:
        return [*super().poll_trees(), *self._lies()]

    def wait_trees(self, timeout_s: float) -> list[TreeFrame]:
        return [*super().wait_trees(timeout_s), *self._lies()]

    def _lies(self) -> list[TreeFrame]:
        """About the sequences and turns of now, so that they are looked at."""
        told, _Liar.lies = _Liar.lies[:2], _Liar.lies[2:]
        if not self.frames:
            return told
        rows = self.frames[-1].rows
        return [
            replace(
                lie,
                branches=tuple(
                    replace(branch, sequence_id=rows[i % len(rows)].sequence_id, turn=rows[i % len(rows)].turn)
                    for i, branch in enumerate(lie.branches)
                ),
            )
            for lie in told
        ]


class Target:
    """A cache, and an engine beside a draft that lies, which get trees."""

    def __init__(self) -> None:
        self._cache = SpeculationCache()
        for number in range(4):
            self._cache.admit(number)
        self._count = 0

    def frame(self, chance: random.Random) -> TreeFrame:
        """One that could come next."""
        branches = []
        for number in range(chance.randrange(8)):
            tokens = tuple(chance.randrange(VOCAB) for _ in range(chance.randrange(SPECULATION.lookahead + 1)))
            branches.append(Branch(number % 4, -1, Outcome(chance.randrange(4), chance.randrange(VOCAB)), tokens))
        return TreeFrame(chance.randrange(100), tuple(branches), chance.randrange(10**6), chance.randrange(64))

    def take(self, tree: TreeFrame) -> None:
        self._cache.store(tree)
        for branch in tree.branches:
            if branch.sequence_id < 4:
                self._cache.lookup(branch.sequence_id, branch.turn, branch.outcome)
        _Liar.lies.append(tree)

    def decode_beside_lies(self) -> None:
        """An engine serves three requests while its draft says what has been taken; the tokens are plain decoding's."""
        honest = [list(one.tokens) for one in self._serve("ar", SteppedDraft)]
        assert [list(one.tokens) for one in self._serve("ssd", _Liar)] == honest, "a draft has changed tokens"

    def _serve(self, mode: str, draft: type[SteppedDraft]) -> Any:
        process = _engine(make_rank=draft)
        params = [SamplingParams(temperature=0.8 * number, seed=number) for number in range(3)]
        wanted = [request((1, 2, 3 + i), mode, max_tokens=30, params=one) for i, one in enumerate(params)]
        try:
            served = process.run(wanted)
        finally:
            _Liar.lies.clear()
        process.assert_all_blocks_are_back()
        return served


def decoded(codec: OutcomeCodec | TreeCodec, words: Tensor) -> Any:
    """The frame in the words; None where the link would end."""
    try:
        return codec.decode(words)
    except (ProtocolError, PeerLost):
        return None
