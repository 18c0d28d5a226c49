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
from functools import partial

from torch import AcceleratorError, Tensor

from ssd_runtime.config import Coupling, EngineConfig, Mode
from ssd_runtime.engine.numerics import FreshTokens, Rounding, share_unit, spare_slots
from ssd_runtime.engine.rows import RowBuilder
from ssd_runtime.engine.scheduler import Scheduler
from ssd_runtime.engine.sequence import Delta, NoText, Request, Sequence, TextStream
from ssd_runtime.engine.speculator import Proposals, Speculator, within_vocabulary
from ssd_runtime.engine.verification import verified
from ssd_runtime.errors import DeviceFault, PeerLost, RequestError
from ssd_runtime.kv.pool import BlockAllocator
from ssd_runtime.kv.table import BlockTable, raise_faults
from ssd_runtime.model.batch import Model
from ssd_runtime.model.device_memory import told
from ssd_runtime.speculation.limits import check_processors, check_sampling
from ssd_runtime.speculation.sampling.logprobs import token_logprobs
from ssd_runtime.speculation.types import MOST_ALTERNATIVES, Outcome, Speculation
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
        decoder: the target model.
        config: sizes.
        max_lookahead: the longest speculation a request may ask for.
        speculators: how each mode speculates; a request in another mode is refused.
        tracer: where rounds are recorded.
        coupling: how speculations are verified; the speculators' drafts must be of the same mind.

    Attributes:
        watch: where the time between verifications went.
    """

    def __init__(
        self,
        decoder: Model,
        config: EngineConfig,
        max_lookahead: int,
        speculators: Mapping[Mode, Speculator],
        tracer: Tracer,
        coupling: Coupling = "shared-noise",
    ) -> None:
        self._decoder = decoder
        self._config = config
        self._max_lookahead = max_lookahead
        self._speculators = dict(speculators)
        self._tracer = tracer
        self._coupling = coupling
        self.allocator = BlockAllocator(config.pool_blocks)
        num_slots = config.pool_blocks * config.block_size
        self._kv = decoder.new_kv(num_slots + spare_slots(decoder, config.numerics))
        self._rounding = Rounding(decoder, config.numerics, spare_slot=num_slots)
        self.scheduler = Scheduler(config)
        self.watch = StallWatch()
        self._next_id = 0
        self._round = 0
        self._last_verify: dict[int, tuple[int, float]] = {}  # sequence -> start of its last verification, its seconds
        self._failed: list[Progressed] = []  # in this round, by what befell them

    # -- requests ------------------------------------------------------------------------------------------------

    def add(self, request: Request, text: TextStream | None = None) -> Sequence:
        """Queue a request.

        Raises:
            RequestError: it could never be served as asked; the message names what to change.
        """
        if request.index == 0:  # the other outputs of a request differ in nothing that can be wrong
            self._check(request)
        table = BlockTable(self.allocator, self._config.block_size, self._config.max_model_len, self._decoder.device)
        longest, unit = self._config.max_model_len, share_unit(self._decoder, self._config)
        sequence = Sequence(self._next_id, request, table, text or NoText(), longest, unit)
        self._next_id += 1
        self.scheduler.add(sequence)
        return sequence

    def _check(self, request: Request) -> None:
        check_sampling(request.params)
        check_processors(request.params, self._decoder.arch.vocab_size, request.eos_token_ids)
        if request.params.min_tokens > request.max_tokens:
            raise RequestError(f"min_tokens {request.params.min_tokens} is above max_tokens {request.max_tokens}")
        if request.logprobs is not None and not 0 <= request.logprobs <= MOST_ALTERNATIVES:
            raise RequestError(f"logprobs must be between 0 and {MOST_ALTERNATIVES}, not {request.logprobs}")
        length, longest = len(request.prompt_tokens), self._config.max_model_len
        if length == 0:
            raise RequestError("the prompt is empty: give at least one token")
        if length >= longest:
            raise RequestError(
                f"the prompt has {length} tokens and engine.max_model_len is {longest}: "
                "shorten the prompt or raise engine.max_model_len"
            )
        vocab_size = self._decoder.arch.vocab_size
        if not all(0 <= token < vocab_size for token in request.prompt_tokens):
            raise RequestError(f"the prompt has token ids outside the vocabulary of {vocab_size} tokens")
        if request.max_tokens < 1:
            raise RequestError(f"max_tokens must be at least 1, not {request.max_tokens}")
        if "" in request.stop:
            raise RequestError("a stop string is empty: every text would stop at once")
        if request.mode not in self._speculators:
            raise RequestError(
                f"mode {request.mode!r} is not served by this engine, which has {', '.join(self._speculators)}: "
                f"start the engine with speculation.mode = {request.mode}"
            )
        if not 0 <= request.lookahead <= self._max_lookahead:
            raise RequestError(
                f"lookahead must be between 0 and speculation.lookahead = {self._max_lookahead}, "
                f"not {request.lookahead}"
            )

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
        self._decoder.check()

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
                sequence.begin(self._decoder.arch.vocab_size)
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
        sequence.table.reserve(end)
        sequence.table.length = end
        rows = RowBuilder(self._decoder.device)
        rows.begin_sequence(sequence.table)
        rows.add_trunk(sequence.tokens[start:end], start)
        forward = rows.build()
        progressed = []
        if end < sequence.num_prompt:
            self._decoder.choose(forward, self._kv, ())
        else:
            (outcome,), logits_RV = verified(
                self._coupling,
                [sequence],
                [Speculation()],
                partial(self._decoder.forward, forward, self._kv),
                partial(self._decoder.choose, forward, self._kv),
            )
            progressed = [_commit(sequence, outcome, Speculation(), logits_RV)]
        end_ns = time.monotonic_ns()
        sequence.measured.prefill_seconds += (end_ns - start_ns) / 1e9
        self._tracer.complete("prefill", start_ns, end_ns, arguments={"tokens": end - start})
        return progressed

    def _verify_round(self, batch: list[Sequence], speculator: Speculator) -> list[Progressed]:
        self._round += 1
        propose_ns = time.monotonic_ns()
        proposals = within_vocabulary(speculator.propose(batch, self._round), self._decoder.arch.vocab_size)
        self.watch.lap("propose", proposals.wait_seconds)
        held_up = any(sequence.sequence_id in self._last_verify for sequence in batch)
        self.watch.end(self._round, held_up=held_up)
        start_ns = time.monotonic_ns()
        self._measure_last_round(batch, proposals, start_ns)
        found = self._verified(batch, proposals.speculations)
        verified_ns = time.monotonic_ns()
        self.watch.begin()
        raise_faults(self._kv)
        progressed = []
        for sequence, outcome, speculation, logits_LV in found:
            with self._contained([sequence], "committing"):
                # The bonus token has no row yet; rejected rows go back.
                sequence.table.rollback(len(sequence.tokens) + outcome.num_accepted)
                progressed.append(_commit(sequence, outcome, speculation, logits_LV))
                sequence.measured.verify_ms.append((verified_ns - start_ns) / 1e6)
                self._last_verify[sequence.sequence_id] = (start_ns, (verified_ns - start_ns) / 1e6)
        came = [(speculation, outcome) for sequence, outcome, speculation, _ in found if not sequence.failure]
        outcomes = [outcome for _, outcome in came]
        if came:
            speculator.observe([speculation for speculation, _ in came], outcomes, (verified_ns - start_ns) / 1e9)
        self._trace_round(proposals, outcomes, propose_ns, start_ns, verified_ns)
        self.watch.lap("commit")
        return progressed

    def _verified(
        self, batch: Sequences[Sequence], speculations: Sequences[Speculation]
    ) -> list[tuple[Sequence, Outcome, Speculation, Tensor | None]]:
        """The outcome of every sequence that has one, and the logits of its rows if they are wanted.

        If it cannot be had of all together, of each alone: one may be to blame for what befell all.
        """
        with self._contained(batch if len(batch) == 1 else (), "verifying"):
            fresh = self._fresh(batch, speculations)
            outcomes, logits_RV = verified(
                self._coupling,
                batch,
                speculations,
                partial(self._rounding.forward, fresh, self._kv),
                partial(self._rounding.choose, fresh, self._kv),
            )
            lengths = [1 + len(speculation.tokens) for speculation in speculations]
            logits = [None] * len(batch) if logits_RV is None else logits_RV.split(lengths)
            return list(zip(batch, outcomes, speculations, logits, strict=True))
        alone = zip(batch, speculations, strict=True) if len(batch) > 1 else ()
        return [one for sequence, speculation in alone for one in self._verified([sequence], [speculation])]

    def _fresh(self, batch: Sequences[Sequence], speculations: Sequences[Speculation]) -> list[FreshTokens]:
        """1 + len(speculation) rows a sequence, their places in its table reserved."""
        found = []
        for sequence, speculation in zip(batch, speculations, strict=True):
            start = len(sequence.tokens) - 1
            fresh = (sequence.tokens[-1], *speculation.tokens)
            sequence.table.reserve(start + len(fresh))
            sequence.table.length = start + len(fresh)
            found.append(FreshTokens(sequence.table, fresh, start))
        return found

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


def _commit(sequence: Sequence, outcome: Outcome, speculation: Speculation, logits_LV: Tensor | None) -> Progressed:
    """Commit, and tell what the raw logits of its rows say of the tokens that were not cut off, if it is asked."""
    delta = sequence.commit(outcome, speculation)
    if sequence.request.logprobs is not None and logits_LV is not None:
        count = len(delta.token_ids)
        logprobs = token_logprobs(logits_LV[:count], delta.token_ids, sequence.request.logprobs)
        if not all(math.isfinite(one.logprob) for one in logprobs):  # a NaN where tokens are excluded
            raise ValueError("the log-probabilities are no numbers")
        delta = replace(delta, logprobs=logprobs)
    return Progressed(sequence, delta, sequence.failure)
