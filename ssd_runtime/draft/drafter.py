"""The draft: one model, the trees of all sequences, their KV rows. Knows no ranks and no links.

`draft/loop.py` drives it on a rank of its own; in mode `sd-colocated` the target's process drives it directly.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ssd_runtime.comm.control.draft_messages import Admit
from ssd_runtime.comm.protocol import ProtocolError
from ssd_runtime.config import EngineConfig, SpeculationConfig
from ssd_runtime.draft.sequence import DraftedSequence, check_admission
from ssd_runtime.kv.pool import BlockAllocator
from ssd_runtime.kv.sharing import take_over
from ssd_runtime.kv.table import BlockTable, ScratchSlots, copy_branch, raise_faults
from ssd_runtime.model.batch import RowBuilder
from ssd_runtime.model.decoder import Decoder
from ssd_runtime.model.memory import chain_nodes, tree_blocks
from ssd_runtime.speculation.drafting.fan_out import Fork, divide_budget
from ssd_runtime.speculation.drafting.policies import fan_out_policy
from ssd_runtime.speculation.drafting.tree import NO_SLOT, Node, TokenTree
from ssd_runtime.speculation.rejection.proposal import ProposalRule, propose_tokens
from ssd_runtime.speculation.sampling.ranking import Choice, Ranking, rank_tokens
from ssd_runtime.speculation.types import OutcomeFrame, OutcomeRow, Plan, Proposal, SamplingParams, Source, TreeFrame

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DraftStep:
    """One forward of the draft: when it ran (`time.monotonic_ns`) and how many rows it had."""

    start_ns: int
    end_ns: int
    rows: int


class Drafter:
    """Drafts for every admitted sequence at once.

    Args:
        decoder: the draft model.
        engine, speculation: sizes and policies.
        vocab_size: tokens that target and draft share; what lies beyond is padding and never drafted.
    """

    def __init__(
        self, decoder: Decoder, engine: EngineConfig, speculation: SpeculationConfig, vocab_size: int | None = None
    ) -> None:
        self._decoder = decoder
        self._engine = engine
        self._speculation = speculation
        self._vocab_size = min(vocab_size or decoder.arch.vocab_size, decoder.arch.vocab_size)
        self._fan_out = fan_out_policy(speculation.fan_out)
        self._rule = proposal_rule(speculation)
        self._num_blocks = engine.pool_blocks + tree_blocks(engine, speculation)
        self._kv = decoder.new_kv(self._num_blocks * engine.block_size)
        self._round = 0
        self._told_of_blind_rows = False
        self.reset()

    def reset(self) -> None:
        """Forget every sequence and the plan: another target, or the same one after a pause, tells anew.

        Whatever state an exception has left, there is nothing of it afterwards.
        """
        engine, speculation = self._engine, self._speculation
        self.allocator = BlockAllocator(self._num_blocks)
        self._scratch = ScratchSlots(self.allocator, engine.block_size, self._num_blocks - engine.pool_blocks)
        self._sequences: dict[int, DraftedSequence] = {}
        self._plan = Plan(speculation.lookahead, speculation.budget)
        self._last_step: DraftStep | None = None

    # -- control -------------------------------------------------------------------------------------------------

    def admit(self, request: Admit) -> None:
        """A sequence begins, or is taken over; the tokens it has are computed in the next steps."""
        self.finish(request.sequence_id)  # told twice: the later word counts
        if request.lookahead > self._speculation.lookahead:
            raise ProtocolError(f"lookahead {request.lookahead} is above the agreed {self._speculation.lookahead}")
        check_admission(request, self._engine.max_model_len)
        prompt = request.prompt_tokens
        table = BlockTable(self.allocator, self._engine.block_size, self._engine.max_model_len, self._decoder.device)
        tree = TokenTree(
            (*prompt, *request.output_tokens),
            lookahead=request.lookahead,
            max_position=min(len(prompt) + request.max_tokens, self._engine.max_model_len),
            fan_out=self._fan_out,
            predraft=request.mode == "ssd",
            temperature=request.params.temperature,
            recycle=self._speculation.recycle,
            turn=request.turn,
            outcome=request.outcome,
        )
        self._sequences[request.sequence_id] = DraftedSequence(request, table, tree, self._vocab_size)

    def finish(self, sequence_id: int) -> None:
        """A sequence is over: its rows go back to the pool."""
        sequence = self._sequences.pop(sequence_id, None)
        if sequence is not None:
            self._scratch.give_back([node.slot for node in sequence.tree.root.walk() if node.slot != NO_SLOT])
            sequence.table.release()
        if not self._sequences:
            self._scratch.release()

    def portion(self, sequence_id: int, index: int, count: int) -> None:
        """Draft for every `count`-th outcome of a sequence, beginning with the `index`-th likeliest.

        The rest is what others draft for.
        """
        if not 0 <= index < count:
            raise ProtocolError(f"portion {index} of {count} is none")
        if sequence_id not in self._sequences:
            raise ProtocolError(f"a portion of sequence {sequence_id}, which this draft does not have")
        self._sequences[sequence_id].portion = (index, count)

    @property
    def num_sequences(self) -> int:
        return len(self._sequences)

    # -- rounds --------------------------------------------------------------------------------------------------

    def advance(self, frame: OutcomeFrame) -> bool:
        """Take in outcomes: adopt branches that hit, roll back where none did, restart from t*.

        Returns:
            Whether the target waits for an answer. It gets what is drafted already, which growing might not push
            again, or nothing yet: a sign of life.

        Raises:
            ProtocolError: an outcome that cannot follow what was known before.
        """
        raise_faults(self._kv)  # the rankings of the last step have been read: there is nothing to wait for
        self._round = frame.round
        self._plan = frame.plan or self._plan
        sources: list[int] = []
        targets: list[int] = []
        freed: list[int] = []
        for row in frame.rows:
            sequence = self._sequences.get(row.sequence_id)
            if sequence is None:  # finished meanwhile
                continue
            in_time = row.turn == sequence.tree.turn + 1
            if in_time:
                committed, dropped = self._commit(sequence, row)
                sources += [node.slot for node in committed]
                targets += [sequence.table.slot(node.position) for node in committed]
                freed += dropped
            elif row.turn != sequence.tree.turn:
                raise ProtocolError(f"sequence {row.sequence_id}: turn {row.turn} after turn {sequence.tree.turn}")
            if row.source != Source.PENDING and sequence.tree.trunk is None:
                after_hit = in_time and row.source == Source.DRAFT
                sequence.tree.resolve(row.length, row.tokens, after_hit=after_hit)
        copy_branch(self._kv, sources, targets)
        self._scratch.give_back(sources + freed)
        return any(row.source == Source.PENDING and row.sequence_id in self._sequences for row in frame.rows)

    def _commit(self, sequence: DraftedSequence, row: OutcomeRow) -> tuple[list[Node], list[int]]:
        """Apply one outcome. Returns the committed nodes whose rows move into the trunk, and the slots set free."""
        tree = sequence.tree
        if tree.trunk is None or row.outcome.num_accepted > len(tree.trunk):
            raise ProtocolError(f"sequence {row.sequence_id}: {row.outcome} without a speculation that long")
        advance = tree.advance(row.outcome)
        forwarded = [node for node in advance.committed if node.slot != NO_SLOT]
        if forwarded:
            assert sequence.table.length == forwarded[0].position, "the root is forwarded after what comes before it"
            sequence.table.length += len(forwarded)
            sequence.table.reserve(sequence.table.length)
        emitted = [*(node.token for node in advance.committed[1:]), row.outcome.bonus_token]
        sequence.tokens += emitted
        if sequence.processors is not None:
            sequence.processors.extend(emitted)
        return forwarded, list(advance.dropped_slots)

    def grow(self) -> DraftStep | None:
        """One forward over what every sequence wants most; None when nothing is left to draft."""
        start_ns = time.monotonic_ns()
        rows = RowBuilder(self._decoder.device)
        nodes: list[tuple[DraftedSequence, Node]] = []
        room = self._engine.prefill_chunk
        for sequence, forks in zip(self._sequences.values(), self._forks(), strict=True):
            if not take_over(sequence.prompt, (one.prompt for one in self._sequences.values())):
                continue  # its prompt is being computed for another
            frontier = sequence.tree.frontier(forks, self._plan.lookahead)
            catch_up = min(sequence.missing, room)
            if not frontier and not sequence.behind:
                continue
            rows.begin_sequence(sequence.table)
            if catch_up:
                room -= catch_up
                start = sequence.table.length
                sequence.table.reserve(start + catch_up)
                sequence.table.length += catch_up
                rows.add_trunk([self._known(token) for token in sequence.tokens[start : start + catch_up]], start)
            if not sequence.missing:
                self._add_frontier(rows, sequence, frontier)
                nodes += [(sequence, node) for node in frontier]
        if not len(rows):
            return None
        logits_RV = self._decoder.forward(rows.build(), self._kv)
        if nodes:
            self._rank(logits_RV, nodes)
        step = DraftStep(start_ns, time.monotonic_ns(), len(rows))
        self._last_step = step if nodes else None  # the prompt's chunks are no drafting steps
        return step

    def _forks(self) -> list[list[Fork]]:
        """The outcomes to draft for, of each sequence: the most gainful of all, B a sequence on average."""
        trees = [sequence.tree for sequence in self._sequences.values()]
        total = min(self._plan.budget * sum(tree.predraft for tree in trees), self._most_forks)
        # The choice may change within a round, and what was drafted stays: never more than there are slots for, with
        # enough left for the chain of every sequence.
        total = max(0, min(total, self._scratch.room - len(trees) * chain_nodes(self._speculation)))
        return divide_budget([sequence.forks(total, self._allowed) for sequence in self._sequences.values()], total)

    @property
    def _allowed(self) -> int:
        """B of one sequence at this draft: as configured, or as planned where that is more, because other drafts have
        the other sequences."""
        return min(max(self._plan.budget, self._speculation.budget), self._most_forks)

    @property
    def _most_forks(self) -> int:
        """Most outcomes to draft for at a time."""
        return self._speculation.budget * self._engine.max_num_seqs

    def _known(self, token: int) -> int:
        """A token of this model: the target's table may be the longer one, and any guess will do behind its padding."""
        return token if 0 <= token < self._decoder.arch.vocab_size else 0

    def _add_frontier(self, rows: RowBuilder, sequence: DraftedSequence, frontier: Sequence[Node]) -> None:
        prefix = sequence.tree.root.position
        for node in frontier:
            node.slot = self._scratch.take()
            rows.add_branch_row(
                self._known(node.token), node.position, prefix, [above.slot for above in node.ancestors()]
            )
            rows.want_logits()

    def _rank(self, logits_RV: Tensor, nodes: Sequence[tuple[DraftedSequence, Node]]) -> None:
        choices = [_choice(sequence, node) for sequence, node in nodes]
        # No position gets more than all drafts of a sequence have for one on average; at one inside the speculation its
        # own token is left out.
        wanted = [self._allowed * sequence.portion[1] for sequence, _ in nodes if sequence.tree.predraft]
        count = 1 + max(wanted, default=0)
        logits_RV = logits_RV[:, : self._vocab_size]
        if self._rule is None:
            rankings = rank_tokens(logits_RV, choices, count)
        else:
            rankings = propose_tokens(logits_RV, choices, count, self._rule)
        for (sequence, node), ranking in zip(nodes, rankings, strict=True):
            sequence.tree.record(node, ranking if ranking.tokens else self._blind(sequence.params))

    def _blind(self, params: SamplingParams) -> Ranking:
        """For a row whose logits leave nothing to choose: any guess is as good as another."""
        if not self._told_of_blind_rows:
            log.warning("logits of this draft are NaN or infinite; it guesses blindly there (said once)")
            self._told_of_blind_rows = True
        samples = self._rule is not None and self._rule.top_m > 1 and params.temperature > 0.0
        return Ranking((0,), (0.0,), 0, Proposal((0,), (1.0,))) if samples else Ranking((0,), (0.0,))

    def tree(self) -> TreeFrame:
        """All branches that are ready, of all sequences. The step that grew them is reported once."""
        found = [sequence.branches() for sequence in self._sequences.values()]
        room = self._most_forks + self._engine.max_num_seqs
        # Should there be more than a frame holds, every sequence sends its likeliest ones.
        in_turns = (branch for rank in itertools.zip_longest(*found) for branch in rank if branch is not None)
        branches = itertools.islice(in_turns, room)
        step, self._last_step = self._last_step, None
        step_us = (step.end_ns - step.start_ns) // 1000 if step else 0
        return TreeFrame(self._round, tuple(branches), step_us, step.rows if step else 0)


def _choice(sequence: DraftedSequence, node: Node) -> Choice:
    """The token behind a node: the path that leads to it from the root, which the sequence has, is speculated."""
    position = node.position + 1
    if sequence.processors is None:
        return Choice(sequence.params, position, text=node.text)
    path = tuple(above.token for above in node.ancestors()[1:])
    rows = range(len(path), len(path) + 1)
    return Choice(sequence.params, position - len(path), rows, path, sequence.processors, node.text)


def proposal_rule(speculation: SpeculationConfig) -> ProposalRule | None:
    """How draft tokens are sampled at a temperature above 0; None under shared noise."""
    if speculation.coupling == "shared-noise":
        return None
    return ProposalRule(speculation.top_m, speculation.saguaro_c, speculation.saguaro_f)
