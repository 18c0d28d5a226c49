"""One sequence as the draft has it: tokens, KV rows, tree, and which part of the outcomes is this draft's."""

from __future__ import annotations

from ssd_runtime.comm.control.draft_messages import Admit
from ssd_runtime.comm.protocol import ProtocolError
from ssd_runtime.kv.sharing import Prompt
from ssd_runtime.kv.table import BlockTable
from ssd_runtime.speculation.drafting.fan_out import Fork
from ssd_runtime.speculation.drafting.tree import TokenTree
from ssd_runtime.speculation.sampling.processors import processors_of
from ssd_runtime.speculation.types import Branch, SamplingParams

EVERYBODY = 0.5  # an outcome of more than this chance is drafted for by every draft of its sequence


class DraftedSequence:
    """What the draft keeps of one sequence. Committed tokens without a KV row yet are caught up in the next forward.

    Attributes:
        portion: this draft's number among those of the sequence, and how many these are.
        taken_over: whether it ran when this draft was told of it.
    """

    def __init__(self, request: Admit, table: BlockTable, tree: TokenTree, vocab_size: int) -> None:
        self.sequence_id = request.sequence_id
        self.params: SamplingParams = request.params
        self.processors = processors_of(request.params, request.prompt_tokens, vocab_size, request.end_tokens)
        if self.processors is not None:
            self.processors.extend(request.output_tokens)
        self.tokens = [*request.prompt_tokens, *request.output_tokens]
        self.num_admitted = len(self.tokens)
        self.table = table
        self.prompt = Prompt(request.prompt_tokens, table)
        self.tree = tree
        self.portion = (0, 1)
        self.taken_over = request.turn >= 0

    @property
    def missing(self) -> int:
        """Committed tokens before the root that have no KV row."""
        return len(self.tokens) - 1 - self.table.length

    @property
    def behind(self) -> bool:
        """Whether tokens that were there at admission still have no KV row: they are computed though nobody asks."""
        return self.table.length < self.num_admitted - 1

    def branches(self) -> list[Branch]:
        """Those that are ready. Who took the sequence over says at least that it has caught up, by an empty branch."""
        found = self.tree.branches(self.sequence_id)
        if not found and self.taken_over and not self.behind:
            return [Branch(self.sequence_id, self.tree.turn - 1, self.tree.outcome, ())]
        return found

    def forks(self, budget: int, allowed: int) -> list[Fork]:
        """This draft's part of what would be drafted for with the budgets of all drafts of the sequence.

        An outcome that is likelier than all others together is part of each: nobody knows which draft will be late.
        That costs the least likely outcomes their places, and is not done where a draft has one place only.

        Args:
            budget: of this draft, for all its sequences.
            allowed: the same for one of them on average, at most.
        """
        index, count = self.portion
        forks = self.tree.forks(budget * count, allowed * count)
        everybodys = [fork for fork in forks[:1] if fork.gain > EVERYBODY and budget > 1]
        return everybodys + forks[len(everybodys) :][index::count]


def check_admission(request: Admit, max_model_len: int) -> None:
    """Raise ProtocolError for a sequence that cannot be."""
    begins, outcome, output = request.turn == -1, request.outcome, request.output_tokens
    fits = not output if begins else bool(output) and outcome is not None and outcome.bonus_token == output[-1]
    length = len(request.prompt_tokens) + len(output)
    if not fits or request.turn < -1 or begins != (outcome is None) or not 0 < length <= max_model_len:
        raise ProtocolError(
            f"sequence {request.sequence_id} cannot be taken over at turn {request.turn} with {length} tokens"
        )
