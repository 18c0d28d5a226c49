"""The engine: one target model, many requests, one decode path for AR, SD and SSD. Knows no sockets and no ranks.

`step` is one round. How it speculates is the business of the speculators it is given, one a mode. Whatever goes wrong
inside a round fails the sequences concerned; only a lost rank of the target, or memory that cannot be trusted, ends the
engine.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as Sequences
from dataclasses import dataclass, replace

from torch import AcceleratorError

from ssd_runtime.config import Coupling, EngineConfig, Mode
from ssd_runtime.engine.request import Request, RequestLimits
from ssd_runtime.engine.runner import Runner, Verified, share_unit
from ssd_runtime.engine.scheduler import Scheduler
from ssd_runtime.engine.sequence import Delta, NoText, Sequence, TextStream
from ssd_runtime.engine.speculator import Proposals, Speculator
from ssd_runtime.errors import DeviceFault, PeerLost
from ssd_runtime.kv.pool import BlockAllocator
from ssd_runtime.kv.table import BlockTable
from ssd_runtime.model.batch import Model
from ssd_runtime.model.device_memory import told
from ssd_runtime.speculation.sampling.logprobs import token_logprobs
from ssd_runtime.speculation.types import Outcome, Speculation
from ssd_runtime.stalls import StallWatch
from ssd_runtime.trace import Tracer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progressed:
    """A sequence got tokens in this round, or ended.

    Attributes:
        failure: why it failed, if it did: the delta is then its last one.
    """

    sequence: Sequence
    delta: Delta
    failure: str | None = None


class Engine:
    """Decodes requests.

    Args:
        runner: the target model on its KV pool.
        scheduler: who is decoded.
        allocator: of the pool's blocks.
        config: sizes.
        limits: what a request may ask for.
        speculators: how each mode speculates.
        tracer: where rounds are recorded.

    Attributes:
        watch: where the time between verifications went.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        allocator: BlockAllocator,
        config: EngineConfig,
        limits: RequestLimits,
        speculators: Mapping[Mode, Speculator],
        tracer: Tracer,
    ) -> None:
        self.scheduler = scheduler
        self.allocator = allocator
        self.watch = StallWatch()
        self._runner = runner
        self._config = config
        self._limits = limits
        self._speculators = speculators
        self._tracer = tracer
        self._next_id = 0
        self._round = 0
        self._last_verify: dict[int, tuple[int, float]] = {}  # sequence -> start of its last verification, its ms
        self._failed: list[Progressed] = []  # in this round, by what befell them

    @classmethod
    def on(
        cls,
        decoder: Model,
        config: EngineConfig,
        max_lookahead: int,
        speculators: Mapping[Mode, Speculator],
        tracer: Tracer,
        coupling: Coupling = "shared-noise",
    ) -> Engine:
        """An engine on a target model, with a KV pool of its own.

        Args:
            max_lookahead: the longest speculation a request may ask for.
            coupling: how speculations are verified; the speculators' drafts must be of the same mind.
        """
        runner = Runner.on(decoder, config, coupling)
        limits = RequestLimits(decoder.arch.vocab_size, config.max_model_len, max_lookahead, tuple(speculators))
        allocator = BlockAllocator(config.pool_blocks)
        return cls(runner, Scheduler(config), allocator, config, limits, speculators, tracer)

    # -- requests ------------------------------------------------------------------------------------------------

    def add(self, request: Request, text: TextStream | None = None) -> Sequence:
        """Queue a request.

        Raises:
            RequestError: it could never be served as asked; the message names what to change.
        """
        decoder, longest = self._runner.decoder, self._config.max_model_len
        if request.index == 0:  # the other outputs of a request differ in nothing that can be wrong
            self._limits.check(request)
        table = BlockTable(self.allocator, self._config.block_size, longest, decoder.device)
        unit = share_unit(decoder, self._config)
        sequence = Sequence(self._next_id, request, table, text or NoText(), longest, unit)
        self._next_id += 1
        self.scheduler.add(sequence)
        return sequence

    def cancel(self, sequences: Iterable[Sequence]) -> None:
        """Stop these sequences, wherever they are; those that have ended stay as they are."""
        for sequence in sequences:
            if sequence.finish_reason is None:
                sequence.finish_reason = "abort"
                self._end(sequence, running=sequence in self.scheduler.running)

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting)

    def check(self) -> None:
        """Between requests: raise PeerLost if a rank of the target is gone."""
        self._runner.decoder.check()

    # -- one round -----------------------------------------------------------------------------------------------

    def step(self) -> list[Progressed]:
        """Admit, prefill a chunk, verify one speculation of every running sequence.

        Raises:
            PeerLost: a rank of the target is gone.
            DeviceFault: the KV rows cannot be trusted any more.
        """
        self._admit()
        self.watch.lap("admit")
        progressed = self._prefill_chunk()
        self.watch.lap("prefill")
        batch = self.scheduler.next_batch()
        for mode, speculator in self._speculators.items():
            members = [sequence for sequence in batch if sequence.request.mode == mode and not sequence.finish_reason]
            if members:
                with self._contained(members, "verifying"):
                    progressed += self._verify_round(members, speculator)
        for item in progressed:
            if item.delta.finish_reason and item.sequence in self.scheduler.running:
                self._end(item.sequence, running=True)
        failed, self._failed = self._failed, []
        return progressed + failed

    @contextlib.contextmanager
    def _contained(self, concerned: Sequences[Sequence], doing: str) -> Iterator[None]:
        """What goes wrong in it fails these sequences and nobody else, unless it befalls the target as a whole."""
        try:
            yield
        except (PeerLost, DeviceFault, AcceleratorError):  # a device that has failed fails whatever comes next
            raise
        except Exception as error:
            ending = [sequence for sequence in concerned if sequence in self.scheduler.running]
            log.exception("%s failed in round %d; %d sequences end with it", doing, self._round, len(ending))
            for sequence in ending:
                sequence.fail(f"{doing} failed: {told(error)}")
                self._end(sequence, running=True)
                self._failed.append(Progressed(sequence, Delta("", (), sequence.finish_reason), sequence.failure))

    def _admit(self) -> None:
        admitted = self.scheduler.admit()
        for sequence in admitted:
            with self._contained([sequence], "admitting"):
                sequence.begin(self._limits.vocab_size)
        for mode, speculator in self._speculators.items():
            if members := [one for one in admitted if one.request.mode == mode and not one.finish_reason]:
                with self._contained(members, "admitting"):
                    speculator.admit(members)

    def _prefill_chunk(self) -> list[Progressed]:
        sequence = self.scheduler.prefilling()
        if sequence is not None:
            with self._contained([sequence], "computing the prompt"):
                return self._prefill(sequence)
        return []

    def _prefill(self, sequence: Sequence) -> list[Progressed]:
        start_ns = time.monotonic_ns()
        self.scheduler.share_prompt(sequence)
        start = sequence.table.length
        end = min(start + self._config.prefill_chunk, sequence.num_prompt)
        found = self._runner.prefill(sequence, start, end)
        progressed = [_commit(found)] if found is not None else []
        end_ns = time.monotonic_ns()
        sequence.measured.prefill_seconds += (end_ns - start_ns) / 1e9
        self._tracer.complete("prefill", start_ns, end_ns, arguments={"tokens": end - start})
        return progressed

    def _verify_round(self, batch: list[Sequence], speculator: Speculator) -> list[Progressed]:
        self._round += 1
        propose_ns = time.monotonic_ns()
        proposals = _within_vocabulary(speculator.propose(batch, self._round), self._limits.vocab_size)
        self.watch.lap("propose", proposals.wait_seconds)
        held_up = any(sequence.sequence_id in self._last_verify for sequence in batch)
        self.watch.end(self._round, held_up=held_up)
        start_ns = time.monotonic_ns()
        self._measure_last_round(batch, proposals, start_ns)
        found = self._verified(batch, proposals.speculations)
        verified_ns = time.monotonic_ns()
        self.watch.begin()
        self._runner.raise_faults()
        progressed = []
        verify_ms = (verified_ns - start_ns) / 1e6
        for one in found:
            sequence = one.sequence
            with self._contained([sequence], "committing"):
                # The bonus token has no row yet; rejected rows go back.
                sequence.table.rollback(len(sequence.tokens) + one.outcome.num_accepted)
                progressed.append(_commit(one))
                sequence.measured.verify_ms.append(verify_ms)
                self._last_verify[sequence.sequence_id] = (start_ns, verify_ms)
        came = [one for one in found if not one.sequence.failure]
        outcomes = [one.outcome for one in came]
        if came:
            speculator.observe([one.speculation for one in came], outcomes, verify_ms / 1e3)
        self._trace_round(proposals, outcomes, propose_ns, start_ns, verified_ns)
        self.watch.lap("commit")
        return progressed

    def _verified(self, batch: Sequences[Sequence], speculations: Sequences[Speculation]) -> list[Verified]:
        """What was decided for every sequence of which it could be.

        If it cannot be had of all together, of each alone: one may be to blame for what befell all.
        """
        with self._contained(batch if len(batch) == 1 else (), "verifying"):
            return self._runner.verify(batch, speculations)
        alone = zip(batch, speculations, strict=True) if len(batch) > 1 else ()
        return [one for sequence, speculation in alone for one in self._verified([sequence], [speculation])]

    # -- endings and measures ------------------------------------------------------------------------------------

    def _end(self, sequence: Sequence, running: bool) -> None:
        self._last_verify.pop(sequence.sequence_id, None)
        self.scheduler.remove(sequence)
        if running:
            with self._contained((), "telling the draft of an end"):
                self._speculators[sequence.request.mode].finish(sequence)

    def _measure_last_round(self, batch: Sequences[Sequence], proposals: Proposals, start_ns: int) -> None:
        """A round lasts from the start of one verification to the start of the next: the last one ends now."""
        wait_ms = proposals.wait_seconds * 1e3
        for sequence, hit in zip(batch, proposals.hits, strict=True):
            measured = sequence.measured
            measured.hits += hit is True
            measured.misses += hit is False
            for milliseconds, _ in proposals.draft_steps:
                measured.draft_step_ms.append(milliseconds)
            measured.wait_ms.append(wait_ms)
            if sequence.sequence_id not in self._last_verify:
                continue
            last_start_ns, last_verify_ms = self._last_verify[sequence.sequence_id]
            round_ms = (start_ns - last_start_ns) / 1e6
            measured.other_ms.append(round_ms - last_verify_ms - wait_ms)
            if hit is not False:
                measured.round_ms.append(round_ms)

    def _trace_round(
        self, proposals: Proposals, outcomes: Sequences[Outcome], propose_ns: int, start_ns: int, verified_ns: int
    ) -> None:
        if not self._tracer.enabled:
            return
        hits = sum(hit is True for hit in proposals.hits)
        lengths = [len(speculation.tokens) for speculation in proposals.speculations]
        accepted = [outcome.num_accepted for outcome in outcomes]
        about = {"round": self._round, "hits": hits, "speculated": lengths, "accepted": accepted}
        self._tracer.complete("propose", propose_ns, start_ns, arguments={"wait_ms": proposals.wait_seconds * 1e3})
        self._tracer.complete("verify", start_ns, verified_ns, arguments=about)
        self._tracer.complete("commit", verified_ns, time.monotonic_ns())


def _within_vocabulary(proposals: Proposals, vocab_size: int) -> Proposals:
    """The same, cut where a draft of a larger table proposes a token that the target has not."""
    if all(max(one.tokens, default=0) < vocab_size for one in proposals.speculations):
        return proposals
    cut = []
    for one in proposals.speculations:
        length = next((k for k, token in enumerate(one.tokens) if token >= vocab_size), len(one.tokens))
        cut.append(replace(one, tokens=one.tokens[:length], proposals=one.proposals[:length]))
    return replace(proposals, speculations=tuple(cut))


def _commit(found: Verified) -> Progressed:
    """Commit, and tell what the raw logits of its rows say of the tokens that were not cut off, if it is asked."""
    sequence, logits_LV = found.sequence, found.logits_LV
    delta = sequence.commit(found.outcome, found.speculation)
    if sequence.request.logprobs is not None and logits_LV is not None:
        count = len(delta.token_ids)
        logprobs = token_logprobs(logits_LV[:count], delta.token_ids, sequence.request.logprobs)
        if not all(math.isfinite(one.logprob) for one in logprobs):  # a NaN where tokens are excluded
            raise ValueError("the log-probabilities are no numbers")
        delta = replace(delta, logprobs=logprobs)
    return Progressed(sequence, delta, sequence.failure)
