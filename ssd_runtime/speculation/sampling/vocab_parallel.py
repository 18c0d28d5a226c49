"""Choosing tokens where each process has a part of the vocabulary. Pure functions; knows no ranks and no wire.

Every process makes a `report` of its columns, a few numbers a row, and `decide` chooses from the reports of all what
`choose` (ranking.py) chooses on the whole logits: the same token, or None where the reports cannot tell. Such a row has
to be chosen on the whole logits.

- Greedy, or a temperature and nothing more: a row's report is its best token and score. The best of the best, the lower
  token where they are equal, is the best of all.
- With top-k, top-p or min-p it adds the log of the part's mass and its head: the tokens with the largest z, at most
  HEAD of them (and no more than top-k asks for). What these filters keep is z >= floor, and the floor can be found as
  long as it is not below the heads. `decide` works with bounds low <= floor <= high, wide enough for every order in
  which a sum of exponentials can be rounded: a token between the bounds may be kept or not, so if its score, or the
  score of anything that no head shows, could beat the best token that is kept for certain, the answer is None.

Scores within TIE of each other are left to the whole logits too. So nothing here has to be rounded as it is there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssd_runtime.speculation.noise import gumbel_noise
from ssd_runtime.speculation.sampling.ranking import Choice, best_of_columns, process_rows, row_by_row, scaled
from ssd_runtime.speculation.types import SamplingParams

HEAD = 64
TIE = 1e-9  # scores are float64 numbers of at most a few hundred
MASS = 1e-7  # the CUDA kernels sum probabilities in units of 2^-44, which is the coarsest
_PLAIN = 2  # numbers of a row without filters: score, token
_FILTERED = 5  # score, token, z of the token, log of the mass, tokens that tie with the last of the head beyond it

Floats = NDArray[np.float64]


def filters(params: SamplingParams, vocab_size: int) -> bool:
    """Whether top-k, top-p or min-p may exclude tokens."""
    cuts = 0 < params.top_k < vocab_size or params.top_p < 1.0 or params.min_p > 0.0
    return params.temperature > 0.0 and cuts


def decidable(choice: Choice, vocab_size: int) -> bool:
    """Whether reports are worth making: they cannot find a floor that lies deeper than their heads."""
    return not filters(choice.params, vocab_size) or choice.params.top_k <= HEAD or choice.params.top_k >= vocab_size


def report(logits_RL: Tensor, choices: Sequence[Choice], first_token: int, vocab_size: int) -> Tensor:
    """What one part has to say, float64 [C]; C is the same for every part.

    Args:
        logits_RL: the model's logits of the rows of all choices, L columns of them (0 too).
        choices: for this part (`Choice.within`).
        first_token: what the first column stands for.
        vocab_size: of all parts together.
    """
    z_RL = process_rows(logits_RL, choices)
    tokens_R, scores_R = best_of_columns(z_RL, choices, first_token)
    best_R2 = torch.stack((scores_R, tokens_R.double()), 1)
    parts = []
    for row, choice in enumerate(row_by_row(choices)):
        parts.append(best_R2[row])
        if filters(choice.params, vocab_size):
            parts.append(_filtered(z_RL[row], choice, int(tokens_R[row]) - first_token, first_token, vocab_size))
    return torch.cat(parts) if parts else best_R2.flatten()


def _filtered(logits_L: Tensor, choice: Choice, best: int, first_token: int, vocab_size: int) -> Tensor:
    """The numbers of one row beyond its best score and token; `best` is the column of that token, if there is one."""
    size = _head_size(choice.params, vocab_size)
    z_L = scaled(logits_L, choice.params.temperature)
    values = z_L.topk(min(size, len(z_L))).values
    last = values[-1] if len(values) == size else z_L.new_tensor(-torch.inf)
    above = (z_L > last).nonzero().squeeze(1)
    # Of those that tie with the last, the ones that are best under noise: if one of them can be chosen, so can these.
    tied = (z_L == last).nonzero().squeeze(1) if last > -torch.inf else above[:0]
    order = gumbel_noise(choice.key, tied + first_token).argsort(descending=True)[: size - len(above)]
    head = torch.cat((above, tied[order]))
    numbers = torch.full((_FILTERED - _PLAIN + 2 * size,), -torch.inf, dtype=torch.float64, device=z_L.device)
    if best >= 0:
        numbers[0] = z_L[best]
    numbers[1] = torch.logsumexp(z_L.double(), 0) if len(z_L) else -torch.inf
    numbers[2] = len(tied) - len(order)
    numbers[3 : 3 + len(head)] = z_L[head].double()
    numbers[3 + size : 3 + size + len(head)] = (head + first_token).double()
    return numbers


def _head_size(params: SamplingParams, vocab_size: int) -> int:
    return min(HEAD, params.top_k) if 0 < params.top_k < vocab_size else HEAD


def decide(reports_GC: Tensor, choices: Sequence[Choice], vocab_size: int) -> list[int | None]:
    """The token chosen at each row, from the reports of all parts; None where it takes the whole logits to tell."""
    reports = reports_GC.double().cpu().numpy()
    tokens: list[int | None] = []
    start = 0
    for choice in row_by_row(choices):
        if filters(choice.params, vocab_size):
            size = _head_size(choice.params, vocab_size)
            end = start + _FILTERED + 2 * size
            tokens.append(_decide_filtered(_Row.of(reports[:, start:end], size), choice))
        else:
            end = start + _PLAIN
            tokens.append(_decide_plain(reports[:, start:end], choice.params.temperature == 0.0))
        start = end
    assert start == reports.shape[1], "reports and choices are of one forward"
    return tokens


def _decide_plain(best_G2: Floats, greedy: bool) -> int | None:
    scores, tokens = best_G2.T
    first = max(range(len(scores)), key=lambda rank: (scores[rank], -tokens[rank]))
    if not np.isfinite(scores[first]) or np.isnan(scores).any():
        return None
    rivals = np.delete(scores, first)
    if not greedy and (rivals > scores[first] - TIE).any():
        return None
    return int(tokens[first])


@dataclass(frozen=True)
class _Row:
    """The reports on G parts of one row.

    Attributes:
        score_G, token_G, z_G: the best under noise.
        mass_G: log of the sum of e^z.
        hidden_G: how many tokens tie with the last of the head and are not in it.
        head_GH, token_GH: z and tokens of the heads; -inf where a part has no more.
        last_G: z of the last of each head; -inf where the head is all there is.
    """

    score_G: Floats
    token_G: Floats
    z_G: Floats
    mass_G: Floats
    hidden_G: Floats
    head_GH: Floats
    token_GH: Floats
    last_G: Floats

    @staticmethod
    def of(numbers: Floats, size: int) -> _Row:
        score_G, token_G, z_G, mass_G, hidden_G = numbers[:, :_FILTERED].T
        head_GH, token_GH = numbers[:, _FILTERED : _FILTERED + size], numbers[:, _FILTERED + size :]
        return _Row(score_G, token_G, z_G, mass_G, hidden_G, head_GH, token_GH, head_GH.min(1))

    @property
    def depth(self) -> float:
        """Every token with z above it is in a head; with z equal to it, as many as could be chosen."""
        return float(self.last_G.max())


def _decide_filtered(row: _Row, choice: Choice) -> int | None:
    most = float(row.head_GH.max())
    if not math.isfinite(most) or np.isnan(row.score_G).any() or np.isnan(row.mass_G).any():
        return None
    low, high = _floor_bounds(row, choice.params, most)
    shown = (row.head_GH >= low) & (row.head_GH > -np.inf)
    tokens, z = row.token_GH[shown].astype(np.int64), row.head_GH[shown]
    scores = z + gumbel_noise(choice.key, torch.from_numpy(tokens)).numpy()
    tokens, z, scores = (np.concatenate(pair) for pair in ((tokens, row.token_G), (z, row.z_G), (scores, row.score_G)))
    kept = z >= high
    winner = int(np.where(kept, scores, -np.inf).argmax())
    unsure = (z >= low) & ~kept
    # What a head does not show scores at most as the best of its part does.
    unsure[-len(row.z_G) :] |= (row.z_G < high) & (row.last_G > low)
    rivals = scores[(kept | unsure) & (tokens != tokens[winner])]
    return None if (rivals > scores[winner] - TIE).any() else int(tokens[winner])


def _floor_bounds(row: _Row, params: SamplingParams, most: float) -> tuple[float, float]:
    """Between which the smallest z lies that the filters leave, -inf for none."""
    # Every z down to the depth of the heads, largest first, and how many tokens have it.
    hidden = row.hidden_G > 0
    values = np.concatenate((row.head_GH.ravel(), row.last_G[hidden]))
    counts = np.concatenate((np.ones(row.head_GH.size), row.hidden_G[hidden]))
    known = (values >= row.depth) & (values > -np.inf)
    order = np.argsort(-values[known], kind="stable")
    values, counts = values[known][order], counts[known][order]
    low = high = -math.inf
    mass = float(np.logaddexp.reduce(row.mass_G))
    end = row.depth  # the floor is not above it where nothing is found down to it
    if params.top_k > 0:
        reached = counts.cumsum() >= params.top_k
        if reached.any():
            low = high = end = float(values[reached.argmax()])
            values, counts = values[values >= low], counts[values >= low]
            mass = float(np.logaddexp.reduce(values + np.log(counts)))
    if params.top_p < 1.0:
        sums = (counts * np.exp(values - mass)).cumsum()
        early, late = sums >= params.top_p - MASS, sums >= params.top_p + MASS
        high = max(high, float(values[early.argmax()]) if early.any() else end)
        low = max(low, float(values[late.argmax()])) if late.any() else low
    if params.min_p > 0.0:
        floor = most + math.log(params.min_p)
        slack = 1e-6 * (1.0 + abs(most) + abs(floor))
        low, high = max(low, floor - slack), min(max(high, floor + slack), most)
    return low, high
