"""The draft's token tree of one sequence: what is drafted, what to draft next, what survives an outcome.

Knows tokens and KV slots as numbers; no tensors, no model, no I/O.

The root is the newest committed token. The speculation being verified hangs from it as a chain ("trunk"); forks leave
the trunk at position k with a bonus candidate t*, and what follows t* along the best children is the branch for the
outcome (k, t*). A node is *forwarded* once the draft's model has run on it: then its KV row exists and its successors
are ranked. Hence no glue pass: when a branch is adopted its nodes keep their rows and their rankings, and only its last
token has still to be forwarded, together with the first tokens of the new forks. A miss is the same tree with a trunk
that is still being drafted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ssd_runtime.speculation.drafting.fan_out import FanOut, Fork, Verified
from ssd_runtime.speculation.drafting.recycling import KEPT, Recycler
from ssd_runtime.speculation.noise import EMPTY_TEXT, extend_text
from ssd_runtime.speculation.sampling.ranking import Ranking
from ssd_runtime.speculation.types import Branch, Outcome, Proposal

NO_SLOT = -1
CERTAIN = 0.85  # an outcome of at least this chance is drafted for twice as deep once its branch is complete


class Node:
    """One drafted token.

    Attributes:
        token, position: the token and its absolute position in the sequence.
        slot: KV slot of its row, NO_SLOT until forwarded.
        text: hash of the sequence up to this token, which keys what the draft samples next.
        ranking: tokens most likely to follow; None until forwarded.
    """

    __slots__ = ("children", "parent", "position", "ranking", "slot", "text", "token")

    def __init__(self, token: int, position: int, parent: Node | None, text: int) -> None:
        self.token = token
        self.position = position
        self.parent = parent
        self.text = text
        self.slot = NO_SLOT
        self.ranking: Ranking | None = None
        self.children: dict[int, Node] = {}

    def child(self, token: int) -> Node:
        """The child of that token, made if it is not there yet."""
        node = self.children.get(token)
        if node is None:
            node = Node(token, self.position + 1, self, extend_text(self.text, (token,)))
            self.children[token] = node
        return node

    def best_child(self) -> Node:
        """The successor by the draft's own choice. Only of a forwarded node."""
        assert self.ranking is not None
        return self.child(self.ranking.draft_token)

    def ancestors(self) -> list[Node]:
        """From the root of the tree down to this node, itself included."""
        path: list[Node] = []
        node: Node | None = self
        while node is not None:
            path.append(node)
            node = node.parent
        return path[::-1]

    def walk(self) -> Iterator[Node]:
        """This node and everything below it."""
        stack = [self]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())


@dataclass(frozen=True)
class Advance:
    """What an outcome did to a tree.

    Attributes:
        committed: the old root and the accepted nodes, in order of position; their rows belong to the sequence now.
        dropped_slots: KV slots of everything that was drafted in vain.
    """

    committed: tuple[Node, ...]
    dropped_slots: tuple[int, ...]


class TokenTree:
    """The tree of one sequence.

    Args:
        prompt: the committed tokens so far; the last one is the root.
        lookahead: K, most tokens of a branch.
        max_position: tokens at this position or beyond are not drafted (the end of the sequence).
        fan_out: policy that chooses the outcomes to draft for; shared by the trees of one draft.
        predraft: whether outcomes are drafted for ahead of time (SSD) or only when asked for (SD).
        temperature: of the request, for the policy.
        recycle: recycled candidates forwarded together with the token that they may follow; the first of them leads a
            chain of as many tokens.
        turn, outcome: where to take over a sequence that runs: `outcome` ends with the last of the committed tokens,
            and `turn` is the verification that follows. As after a miss, nothing is drafted yet.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        *,
        lookahead: int,
        max_position: int,
        fan_out: FanOut,
        predraft: bool,
        temperature: float = 0.0,
        recycle: int = 0,
        turn: int = -1,
        outcome: Outcome | None = None,
    ) -> None:
        root_token = prompt[-1]
        self.root = Node(root_token, len(prompt) - 1, None, extend_text(EMPTY_TEXT, prompt))
        self.turn = turn
        self.outcome = outcome or Outcome(0, root_token)
        # None: a miss, the just-in-time branch is wanted
        self.trunk: list[Node] | None = [] if outcome is None else None
        self._lookahead = lookahead
        self._max_position = max_position
        self._fan_out = fan_out
        self.predraft = predraft
        self._temperature = temperature
        self._after_hit = True
        self._gains: dict[Outcome, float] = {}
        self._recycle = recycle
        self._recycler = Recycler(prompt if recycle else ())
        self._before_root = prompt[-2] if len(prompt) > 1 else None

    # -- outcomes ------------------------------------------------------------------------------------------------

    def advance(self, outcome: Outcome) -> Advance:
        """Verification `turn` came out as `outcome`: its subtree becomes the tree, the rest is dropped."""
        assert self.trunk is not None, "an outcome before the speculation it is the outcome of"
        self._fan_out.observe(self._verified(), outcome.num_accepted, outcome.bonus_token)
        committed = (self.root, *self.trunk[: outcome.num_accepted])
        root = committed[-1].child(outcome.bonus_token)
        committed[-1].children.pop(root.token)
        gone = [node.slot for node in self.root.walk() if node.slot != NO_SLOT]
        kept = {node.slot for node in committed}
        root.parent = None
        text = [node.token for node in (*committed, root)]
        if self._recycle:
            self._recycler.learn_text(text if self._before_root is None else [self._before_root, *text])
        self._before_root = text[-2]
        self.root, self.trunk = root, None
        self.turn, self.outcome = self.turn + 1, outcome
        self._gains = {}
        return Advance(committed, tuple(slot for slot in gone if slot not in kept))

    def resolve(self, length: int, tokens: Sequence[int] = (), *, after_hit: bool = True) -> None:
        """Verification `turn` starts: of `tokens` if given, else of the first `length` tokens of the best chain.

        Args:
            after_hit: whether the target found the speculation in its cache.
        """
        self.trunk = []
        self._after_hit = after_hit
        node = self.root
        for index in range(length):
            node = node.child(tokens[index]) if tokens else node.best_child()
            self.trunk.append(node)

    # -- growth --------------------------------------------------------------------------------------------------

    def forks(self, budget: int, allowed: int | None = None) -> list[Fork]:
        """Up to `budget` outcomes the policy would draft for, the most gainful first; none while a miss is open.

        Args:
            allowed: B of this sequence alone, if `budget` is that of a batch.
        """
        if self.trunk is None or not self.predraft:
            return []
        return self._fan_out.forks(self._verified(), budget, allowed)

    def frontier(self, forks: Sequence[Fork], depth: int | None = None) -> list[Node]:
        """The nodes the next forward should run on, parents before children; empty when there is nothing to gain.

        Args:
            forks: what this sequence got of what `forks` wanted.
            depth: tokens that a branch drafted ahead should have, 0 for no drafting ahead; the lookahead if not given.
        """
        depth = self._lookahead if depth is None else min(depth, self._lookahead)
        if self.trunk is None:
            tip = self._tip(self.root, self._lookahead)
            return [] if tip is None else [tip, *self._recycled(tip)]
        if not self.predraft or not depth:
            return []
        nodes = (self.root, *self.trunk)
        rows = [node for node in nodes if node.ranking is None and self._allowed(node)]
        # The likeliest outcome is that all is accepted: what comes next there is worth a bet.
        main = rows[-1] if rows else self._tip(self._likeliest(nodes[-1]), depth) if nodes[-1].ranking else None
        for k, token, gain in forks:
            self._gains[Outcome(k, token)] = gain
            start = nodes[k].child(token)
            tip = self._tip(start, depth)
            if tip is None and gain >= CERTAIN and k == len(self.trunk):
                tip = self._tip(start, 2 * depth)  # the next round's branch, before its turn
            if tip is not None:
                rows.append(tip)
        return rows if main is None or main not in rows else [*rows, *self._recycled(main)]

    @staticmethod
    def _likeliest(node: Node) -> Node:
        """The bonus candidate that the target is likeliest to choose: no matter which one the draft would sample."""
        assert node.ranking is not None
        return node.child(node.ranking.tokens[0])

    def _recycled(self, node: Node) -> list[Node]:
        """Bets below a node that is about to be forwarded: likely children, and what may follow the likeliest one."""
        children = [child for child in self._guessed(node, self._recycle) if self._allowed(child)]
        bets = list(children)
        while children and len(bets) < 2 * self._recycle - 1:
            children = [child for child in self._guessed(children[0], 1) if self._allowed(child)]
            bets += children
        return [bet for bet in bets if bet.ranking is None]

    def _guessed(self, node: Node, count: int) -> list[Node]:
        """Children of a node by what followed its token earlier, the likeliest first."""
        previous = self._before_root if node.parent is None else node.parent.token
        return [node.child(token) for token in self._recycler.guess(previous, node.token, count)]

    def record(self, node: Node, ranking: Ranking) -> None:
        """A node was forwarded."""
        node.ranking = ranking
        if self._recycle:
            previous = self._before_root if node.parent is None else node.parent.token
            self._recycler.learn(previous, node.token, ranking.tokens[:KEPT])

    def _verified(self) -> Verified:
        assert self.trunk is not None
        rankings = [node.ranking for node in (self.root, *self.trunk)]
        return Verified([node.token for node in self.trunk], rankings, self._temperature, self._after_hit)

    def _tip(self, start: Node, depth: int) -> Node | None:
        """The node to forward for one more token on the branch that starts below `start`; None if it has `depth`."""
        node = start
        for _ in range(depth):
            if node.ranking is None:
                return node if self._allowed(node) else None
            node = node.best_child()
        return None

    def _allowed(self, node: Node) -> bool:
        return node.position < self._max_position - 1

    # -- what the target gets ------------------------------------------------------------------------------------

    def branches(self, sequence_id: int) -> list[Branch]:
        """Every branch with at least one drafted token, the likeliest first; on a miss only the just-in-time one."""
        if self.trunk is None:
            found = [(self.turn - 1, self.outcome, self.root)]
        elif not self.predraft:
            found = []
        else:
            found = [(self.turn, Outcome(k, child.token), child) for k, child in self._outcomes()]
        return [
            self._branch(sequence_id, turn, outcome, start)
            for turn, outcome, start in found
            if start.ranking is not None
        ]

    def _outcomes(self) -> list[tuple[int, Node]]:
        """(k, bonus node) of every forwarded bonus candidate, the most gainful first, later positions among equals."""
        assert self.trunk is not None
        ranked: list[tuple[float, int, int, Node]] = []
        for k, node in enumerate((self.root, *self.trunk)):
            accepted = self.trunk[k].token if k < len(self.trunk) else None
            for rank, token in enumerate(node.ranking.tokens if node.ranking else ()):
                child = node.children.get(token)
                if child is not None and child.ranking is not None and token != accepted:
                    gain = self._gains.get(Outcome(k, token), -math.inf)
                    ranked.append((-gain, rank, -k, child))
        return [(-k, child) for _, _, k, child in sorted(ranked, key=lambda item: item[:3])]

    def _branch(self, sequence_id: int, turn: int, outcome: Outcome, start: Node) -> Branch:
        """What follows `start`. A token is part of it as soon as it is drafted, whichever token it is (noise.py)."""
        tokens: list[int] = []
        proposals: list[Proposal] = []
        node = start
        while node.ranking is not None and len(tokens) < self._lookahead:
            if node.ranking.proposal is not None:
                proposals.append(node.ranking.proposal)
            node = node.best_child()
            tokens.append(node.token)
        return Branch(sequence_id, turn, outcome, tuple(tokens), tuple(proposals))
