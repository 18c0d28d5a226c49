"""Exact laws of what rejection sampling emits, by summation; chi-square tests of what was emitted, and their power.

Pure functions of tables: a target that looks at one token, a draft that looks at two. Shape legend: V vocabulary, J
draft tokens of a round that are still to be verified, C contexts, X texts, B cells after pooling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CRITICAL_Z = 3.72  # of the standard normal, one-sided p = 1e-4
POOLED = 5.0  # cells are pooled until about so many texts are expected in each


def next_tokens(table_VVV: Tensor, temperature: float) -> Tensor:
    """The distribution after every two tokens, float64 [V, V, V]."""
    return torch.softmax(table_VVV.double() / temperature, dim=2)


def joint_law(p_VV: Tensor, length: int) -> Tensor:
    """The chances of `length` tokens given the one before them: [V, V ** length]."""
    law = p_VV
    for _ in range(length - 1):
        law = law[..., None] * p_VV
    return law.reshape(len(p_VV), -1)


# ---- counts against chances ------------------------------------------------------------------------------------------


def counted(texts: Sequence[Sequence[int]], size: int, context: int, length: int) -> Tensor:
    """How often `length` tokens followed `context` tokens, in windows side by side: [V ** context, V ** length]."""
    total = torch.zeros(size ** (context + length), dtype=torch.float64)
    places = size ** torch.arange(context + length - 1, -1, -1)
    for text in texts:
        windows = torch.tensor(text).unfold(0, context + length, length)
        total += torch.bincount((windows * places).sum(dim=1), minlength=len(total))
    return total.reshape(size**context, -1)


@dataclass(frozen=True)
class ChiSquare:
    """A statistic and its degrees of freedom. Of expected counts under another law it is the noncentrality."""

    statistic: float
    freedom: int

    @classmethod
    def of(cls, counts_CX: Tensor, chances_CX: Tensor) -> ChiSquare:
        """Over all contexts: given how often each occurred, the counts of a Markov chain are multinomial in the limit.

        Texts are pooled in order of their chances, so that cells are expected POOLED times or more, on average.
        """
        expected_CX = chances_CX * counts_CX.sum(dim=1, keepdim=True)
        order_CX = expected_CX.argsort(dim=1, descending=True)
        expected_CX, counts_CX = expected_CX.gather(1, order_CX), counts_CX.gather(1, order_CX)
        last_C1 = (counts_CX.sum(dim=1, keepdim=True) / POOLED).floor().long() - 1
        before_CX = expected_CX.cumsum(dim=1) - expected_CX
        cell_CX = (before_CX / POOLED + 1e-9).floor().long().minimum(last_C1.clamp(min=0))
        shape = (len(counts_CX), int(cell_CX.max()) + 1)
        expected_CB = torch.zeros(shape, dtype=torch.float64).scatter_add(1, cell_CX, expected_CX)
        counts_CB = torch.zeros(shape, dtype=torch.float64).scatter_add(1, cell_CX, counts_CX)
        cells_CB = expected_CB > 1e-9
        statistic = ((counts_CB - expected_CB)[cells_CB] ** 2 / expected_CB[cells_CB]).sum()
        return cls(float(statistic), int((cells_CB.sum(dim=1) - 1).clamp(min=0).sum()))

    @classmethod
    def of_choices(cls, chosen_N: Tensor, chances_NV: Tensor) -> ChiSquare:
        """Of tokens chosen one after the other, each by chances that may depend on all tokens before it.

        What was chosen less what was expected is a martingale, so the sums over N choices are normal in the limit, with
        the sum of the covariances of the choices. Tokens expected less than POOLED times count as one.
        """
        expected_V = chances_NV.sum(dim=0)
        off_V = torch.bincount(chosen_N, minlength=len(expected_V)) - expected_V
        covariance_VV = torch.diag(expected_V) - chances_NV.T @ chances_NV
        cell_V = torch.where(expected_V < POOLED, 0, torch.arange(1, len(expected_V) + 1))
        cells, cell_V = cell_V.unique(return_inverse=True)
        pool_BV = torch.nn.functional.one_hot(cell_V, len(cells)).T.double()
        if float((pool_BV @ expected_V).min()) < POOLED:  # the pool itself is rare: with the most common one
            pool_BV[(pool_BV @ expected_V).argmax()] += pool_BV[0]
            pool_BV = pool_BV[1:]
        off_B, covariance_BB = (pool_BV @ off_V)[1:], (pool_BV @ covariance_VV @ pool_BV.T)[1:, 1:]
        return cls(float(off_B @ torch.linalg.solve(covariance_BB, off_B)), len(off_B)) if len(off_B) else cls(0.0, 0)

    def __add__(self, other: ChiSquare) -> ChiSquare:
        return ChiSquare(self.statistic + other.statistic, self.freedom + other.freedom)

    @property
    def z(self) -> float:
        """As a standard normal (Wilson and Hilferty 1931)."""
        spread = 2 / (9 * self.freedom)
        return ((self.statistic / self.freedom) ** (1 / 3) - (1 - spread)) / spread**0.5

    @property
    def power(self) -> float:
        """The chance that a test with this noncentrality gives z > CRITICAL_Z: noncentral chi-square, exactly.

        A Poisson mixture: sum over j of Poisson(j; lambda / 2) Q(freedom / 2 + j, x / 2).
        """
        spread = 2 / (9 * self.freedom)
        critical = self.freedom * (1 - spread + CRITICAL_Z * spread**0.5) ** 3
        half = self.statistic / 2
        j = torch.arange(int(half + 20 * half**0.5) + 50, dtype=torch.float64)
        weight = (j * torch.tensor(half, dtype=torch.float64).log() - half - torch.lgamma(j + 1)).exp()
        beyond = torch.special.gammaincc(self.freedom / 2 + j, torch.full_like(j, critical / 2))
        return float((weight * beyond).sum())


# ---- what a rule of verification emits -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """How a draft token is verified, right or wrong, after every two tokens.

    Attributes:
        accepted_VVV: chance that the draft proposes the token and the target accepts it.
        instead_VVV: what is emitted after a rejection.
    """

    accepted_VVV: Tensor
    instead_VVV: Tensor


def verification(
    p_VVV: Tensor,
    sampled_VVV: Tensor,
    accepts: Callable[[Tensor, Tensor], Tensor] | None = None,
    verified_VVV: Tensor | None = None,
    residual_VVV: Tensor | None = None,
) -> Rule:
    """Accept with chance min(1, p/q), else draw from max(p - q, 0): and what may be wrong about it.

    Args:
        sampled_VVV: what the draft samples from.
        accepts: the chance of acceptance from p and q.
        verified_VVV, residual_VVV: q in the comparison and in the residual, if not what was sampled from.
    """
    q_VVV = sampled_VVV if verified_VVV is None else verified_VVV
    ratio_VVV = (p_VVV / q_VVV.clamp(min=1e-300)).clamp(max=1.0) if accepts is None else accepts(p_VVV, q_VVV)
    rest_VVV = (p_VVV - (q_VVV if residual_VVV is None else residual_VVV)).clamp(min=0.0)
    total_VV1 = rest_VVV.sum(dim=2, keepdim=True)
    instead_VVV = torch.where(total_VV1 > 1e-12, rest_VVV / total_VV1.clamp(min=1e-300), p_VVV)
    return Rule(sampled_VVV * ratio_VVV, instead_VVV)


class Rounds:
    """The chain of rounds that are always `lookahead` tokens long: its state is two tokens and J.

    Args:
        p_VVV: the target.
        rule: how draft tokens are verified.
    """

    def __init__(self, p_VVV: Tensor, rule: Rule, lookahead: int) -> None:
        size = len(p_VVV)
        # What is emitted with j tokens left, and how many are left then.
        self._steps = torch.zeros(lookahead + 1, size, size, size, lookahead + 1, dtype=torch.float64)
        rejected_VV1 = 1.0 - rule.accepted_VVV.sum(dim=2, keepdim=True)
        for left in range(1, lookahead + 1):
            self._steps[left, ..., left - 1] = rule.accepted_VVV
            self._steps[left, ..., lookahead] += rejected_VV1 * rule.instead_VVV
        self._steps[0, ..., lookahead] = p_VVV
        state_JVV = torch.full((lookahead + 1, size, size), 1.0 / (lookahead + 1) / size**2, dtype=torch.float64)
        for _ in range(400):
            state_JVV = torch.einsum("jab,jabyk->kby", state_JVV, self._steps)
        self._state_JVV = state_JVV

    def law(self, context: int, length: int) -> Tensor:
        """The chance of each text of `context` + `length` tokens, in the long run: [V ** context, V ** length]."""
        size = self._state_JVV.shape[1]
        flow = torch.einsum("jab->abj", self._state_JVV)
        for _ in range(length):
            flow = torch.einsum("...abj,jabyk->...abyk", flow, self._steps)
        flow = flow.sum(dim=-1)
        return (flow if context == 2 else flow.sum(dim=0)).reshape(size**context, size**length)
