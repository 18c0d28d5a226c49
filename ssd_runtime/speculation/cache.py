"""The speculation cache: outcome -> branch. Knows no ranks, no I/O.

It lives at the leader, so a lookup is local and a hit costs no round trip. Trees arrive while the target computes;
a later tree supersedes an earlier one, which for one outcome means that its branch goes on.
"""

from __future__ import annotations

from ssd_runtime.speculation.types import Branch, Outcome, Proposal, TreeFrame


class SpeculationCache:
    """Branches of the latest turn of each sequence."""

    def __init__(self) -> None:
        self._turn: dict[int, int] = {}
        self._branches: dict[int, dict[Outcome, Branch]] = {}

    def admit(self, sequence_id: int) -> None:
        """Start to keep branches of a sequence; those of unknown sequences are dropped."""
        self._turn[sequence_id] = -1
        self._branches[sequence_id] = {}

    def finish(self, sequence_id: int) -> None:
        """Forget a sequence. Late trees for it are dropped."""
        self._turn.pop(sequence_id, None)
        self._branches.pop(sequence_id, None)

    def advance(self, sequence_id: int, turn: int) -> None:
        """Verification `turn` of the sequence starts: only its own outcomes matter from now on."""
        if self._turn.get(sequence_id, turn) != turn:
            self._turn[sequence_id] = turn
            self._branches[sequence_id] = {}

    def store(self, tree: TreeFrame) -> None:
        """Take in what the draft has pushed; stale turns are dropped."""
        for branch in tree.branches:
            self._store(branch)

    def _store(self, branch: Branch) -> None:
        if self._turn.get(branch.sequence_id) != branch.turn:
            return
        branches = self._branches[branch.sequence_id]
        known = branches.get(branch.outcome)
        # Of two drafts' branches the first stays. The longer one would win by its length, which may depend on its own
        # tokens; rejection sampling is exact only if what is offered does not (ARCHITECTURE.md).
        if known is None or _goes_on(known, branch):
            branches[branch.outcome] = branch

    def lookup(self, sequence_id: int, turn: int, outcome: Outcome) -> tuple[int, ...] | None:
        """The branch for `outcome` of verification `turn`, or None: a miss."""
        branch = self._branch(sequence_id, turn, outcome)
        return None if branch is None else branch.tokens

    def proposals(self, sequence_id: int, turn: int, outcome: Outcome) -> tuple[Proposal, ...]:
        """What the tokens of that branch were sampled from; () on a miss, or where none was sampled."""
        branch = self._branch(sequence_id, turn, outcome)
        return () if branch is None else branch.proposals

    def _branch(self, sequence_id: int, turn: int, outcome: Outcome) -> Branch | None:
        return self._branches[sequence_id].get(outcome) if self._turn.get(sequence_id) == turn else None

    def __len__(self) -> int:
        return sum(len(branches) for branches in self._branches.values())


def _goes_on(known: Branch, branch: Branch) -> bool:
    same_tokens = branch.tokens[: len(known.tokens)] == known.tokens
    return same_tokens and branch.proposals[: len(known.proposals)] == known.proposals
