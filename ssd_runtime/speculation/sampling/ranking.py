"""From logits to tokens: how the tokens at the rows of a forward are chosen under shared noise.

    y_i = argmax_v [ z_v + g(seed, i, v) ],  z = processed logits / temperature  (temperature 0: g = 0)

The target calls `choose`, the draft `rank_tokens`: the same expression on its own logits, so the draft's best token is
its best guess of what the target will choose. `rank_tokens_oracle` is the plain definition over the whole vocabulary;
the fast path evaluates noise only where the bound on it leaves a chance, or is the compiled operator. vocab_parallel.py
does the same where each process has some of the columns. Knows no models and no ranks.

A row that has a NaN or +inf among its logits, or nothing but -inf, leaves nothing to choose: its ranking is empty.

Processors in order: those of processors.py, then temperature, top-k, top-p, min-p (each on what the one before left).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cuda_ext import ops
from cuda_ext.ops import to_host
from ssd_runtime.speculation.noise import MAX_NOISE, gumbel_noise, noise_key
from ssd_runtime.speculation.sampling.processors import LogitsProcessors
from ssd_runtime.speculation.types import NO_TOKEN, Proposal, SamplingParams

_HEAD = 64  # tokens whose noise is evaluated first, for a bound on the winners
_NUCLEUS = 1024  # most nucleus sets are smaller than this; sorting the whole vocabulary is the slow way out


@dataclass(frozen=True)
class Choice:
    """How the tokens at consecutive rows of one sequence are chosen, one more speculated token before each.

    Attributes:
        params: of the request.
        position: absolute position of the token that is chosen with no speculated token before it.
        rows: how many speculated tokens are before each row.
        speculated: tokens between the text that the processors have counted and the rows, as many as the last row has
            before it or more; looked at by the processors alone.
        processors: of the sequence; None if it has none.
        text: hash of the tokens before the first row (noise.py); only rejection sampling looks at it.
    """

    params: SamplingParams
    position: int
    rows: range = range(1)
    speculated: tuple[int, ...] = ()
    processors: LogitsProcessors | None = None
    text: int = 0

    @property
    def key(self) -> int:
        """Of the noise at the first row."""
        return noise_key(self.params.seed, self.position + self.rows.start)

    def part(self, rows: slice) -> Choice:
        """The same for some of the rows, under shared noise."""
        return replace(self, rows=self.rows[rows])

    def within(self, start: int, stop: int) -> Choice:
        """The same for a part of the vocabulary, with tokens counted from its start."""
        if self.processors is None:
            return self
        shifted = tuple(token - start for token in self.speculated)
        return replace(self, speculated=shifted, processors=self.processors.within(start, stop))


def count_rows(choices: Sequence[Choice]) -> int:
    return sum(len(choice.rows) for choice in choices)


def row_by_row(choices: Sequence[Choice]) -> list[Choice]:
    """The same as a choice for each row."""
    if all(len(choice.rows) == 1 for choice in choices):
        return list(choices)
    return [choice.part(slice(row, row + 1)) for choice in choices for row in range(len(choice.rows))]


@dataclass(frozen=True)
class Ranking:
    """The tokens most likely to be chosen at one row, best first.

    Attributes:
        tokens: token ids.
        margins: how far each lies below the first, in logits: noised score times temperature. 0 for the first.
        sampled: the draft's token here where it was sampled apart from the ranking, which then is by logits alone
            (proposal.py); None: the first one is the draft's token.
        proposal: what it was sampled from; None if it was not.
    """

    tokens: tuple[int, ...]
    margins: tuple[float, ...]
    sampled: int | None = None
    proposal: Proposal | None = None

    @property
    def draft_token(self) -> int:
        """The token that the draft puts here when this position is speculated."""
        return self.tokens[0] if self.sampled is None else self.sampled


def process_rows(logits_RV: Tensor, choices: Sequence[Choice]) -> Tensor:
    """Logits after the processors of processors.py, [R, V]; the same tensor if no row has any.

    Args:
        logits_RV: of the model, for the rows of all choices in order.
    """
    if all(choice.processors is None for choice in choices):
        return logits_RV
    z_RV = logits_RV.float().clone()
    row = 0
    for choice in choices:
        for length in choice.rows:
            if choice.processors is not None:
                choice.processors.process(logits_RV[row], choice.speculated[:length], z_RV[row])
            row += 1
    return z_RV


def process_logits(logits_V: Tensor, params: SamplingParams) -> Tensor:
    """Logits after temperature, top-k, top-p and min-p, float32 [V]; excluded tokens are -inf.

    Tokens that tie with the last one kept are kept too, so the result does not depend on an order of sorting.
    """
    z_V = logits_V.float()
    if params.temperature == 0.0:
        return z_V
    z_V = z_V / params.temperature
    floor = -torch.inf
    if 0 < params.top_k < z_V.numel():
        floor = float(z_V.topk(params.top_k).values[-1])
        z_V = z_V.masked_fill(z_V < floor, -torch.inf)
    if params.top_p < 1.0:
        floor = max(floor, _nucleus_floor(z_V, params.top_p))
    if params.min_p > 0.0:
        floor = max(floor, float(z_V.max() + torch.log(torch.tensor(params.min_p))))
    return z_V if floor == -torch.inf else z_V.masked_fill(z_V < floor, -torch.inf)


def _nucleus_floor(z_V: Tensor, top_p: float) -> float:
    """The smallest processed logit inside the nucleus: the least set of best tokens with probability >= top_p."""
    total = torch.logsumexp(z_V.double(), dim=0)
    for size in (_NUCLEUS, z_V.numel()):
        best = z_V.topk(min(size, z_V.numel())).values
        reached = torch.exp(best.double() - total).cumsum(0) >= top_p
        if bool(reached[-1]) or best.numel() == z_V.numel():
            last = int(reached.int().argmax()) if bool(reached[-1]) else best.numel() - 1
            return float(best[last])
    raise AssertionError("the second size is the whole vocabulary")


def rank_tokens_oracle(logits_RV: Tensor, choices: Sequence[Choice], count: int) -> list[Ranking]:
    """`rank_tokens` by definition: noise for the whole vocabulary, then a stable sort."""
    ranked = []
    tokens_V = torch.arange(logits_RV.shape[1], device=logits_RV.device)
    for logits_V, one in zip(process_rows(logits_RV, choices), row_by_row(choices), strict=True):
        score_V = process_logits(logits_V, one.params).double()
        if not math.isfinite(score_V.max()):
            ranked.append(Ranking((), ()))
            continue
        if one.params.temperature > 0.0:
            score_V = score_V + gumbel_noise(one.key, tokens_V)
        order = torch.sort(score_V, descending=True, stable=True).indices[:count]
        ranked.append(_ranking(order, score_V[order], one.params))
    return ranked


def _ranking(tokens: Tensor, scores: Tensor, params: SamplingParams) -> Ranking:
    """Of tokens and their scores, best first; what is excluded is left out."""
    tokens, scores = to_host(tokens, scores)
    left = scores > -torch.inf
    tokens, scores = tokens[left], scores[left]
    margins = (scores[0] - scores) * (params.temperature or 1.0) if len(scores) else scores
    return Ranking(tuple(tokens.tolist()), tuple(margins.tolist()))


def rank_tokens(logits_RV: Tensor, choices: Sequence[Choice], count: int) -> list[Ranking]:
    """The `count` tokens most likely to be chosen at each row: fewer where processors leave fewer, none of logits that
    are not numbers.

    Args:
        logits_RV: of the model, for the rows of all choices in order; any float dtype.
        count: how many, at least 1.
    """
    count = min(count, logits_RV.shape[1])
    z_RV = process_rows(logits_RV, choices).contiguous()
    if ops.compiled_for(z_RV.device):
        return _rank_compiled(z_RV, choices, count)
    rows = row_by_row(choices)
    greedy = [row for row, one in enumerate(rows) if one.params.temperature == 0.0]
    ranked: dict[int, Ranking] = {}
    if greedy:
        greedy_RV = z_RV if len(greedy) == len(rows) else z_RV[greedy]
        ranked = dict(zip(greedy, _rank_greedy(greedy_RV, count), strict=True))
    for row, one in enumerate(rows):
        if one.params.temperature > 0.0:
            tokens, scores = _best_noised(process_logits(z_RV[row], one.params), one.key, count)
            ranked[row] = _ranking(tokens, scores, one.params)
    return [ranked[row] for row in range(len(rows))]


def choose(logits_RV: Tensor, choices: Sequence[Choice]) -> list[int]:
    """The token chosen at each row: the first of `rank_tokens`, NO_TOKEN where there is none."""
    if not choices:
        return []
    return [ranking.tokens[0] if ranking.tokens else NO_TOKEN for ranking in rank_tokens(logits_RV, choices, 1)]


def _rank_compiled(z_RV: Tensor, choices: Sequence[Choice], count: int) -> list[Ranking]:
    params = [choice.params for choice in choices for _ in choice.rows]
    tokens_RF, scores_RF = to_host(*_sample(z_RV, params, choices, count))
    rankings = []
    for tokens, scores, one in zip(tokens_RF.tolist(), scores_RF.tolist(), params, strict=True):
        left = count - tokens.count(-1)  # processors may leave fewer
        margins = tuple((scores[0] - score) * (one.temperature or 1.0) for score in scores[:left])
        rankings.append(Ranking(tuple(tokens[:left]), margins))
    return rankings


def _sample(
    z_RV: Tensor, params: Sequence[SamplingParams], choices: Sequence[Choice], count: int, first_token: int = 0
) -> tuple[Tensor, Tensor]:
    """All rows in one operator, each by its params: tokens and scores [R, count]."""
    positions = [choice.position + row for choice in choices for row in choice.rows]
    real_3R = [[one.temperature for one in params], [one.top_p for one in params], [one.min_p for one in params]]
    # Two copies to the device, not six.
    temperature_R, top_p_R, min_p_R = torch.tensor(real_3R, dtype=torch.float64).to(z_RV.device)
    whole_2R = torch.tensor([[one.top_k for one in params], positions], dtype=torch.int64)
    seed_R = torch.tensor([one.seed for one in params], dtype=torch.uint64).view(torch.int64)
    top_k_R, position_R, seed_R = torch.cat((whole_2R, seed_R[None])).to(z_RV.device)
    return ops.sample_shared_noise(
        z_RV, temperature_R, top_k_R, top_p_R, min_p_R, seed_R, position_R, count, first_token
    )


def _rank_greedy(logits_RV: Tensor, count: int) -> list[Ranking]:
    """Ties go to the lower token id in the first place (argmax), as in the oracle."""
    most_R, first_R = logits_RV.max(dim=-1)  # NaN is the greatest of all
    if count == 1:
        pairs = zip(*(found.tolist() for found in to_host(most_R, first_R)), strict=True)
        return [Ranking((first,), (0.0,)) if math.isfinite(most) else Ranking((), ()) for most, first in pairs]
    best = logits_RV.topk(count, dim=-1)
    found = to_host(first_R, best.indices, best.values)
    rankings = []
    for first, tokens, values in zip(*(each.tolist() for each in found), strict=True):
        if not math.isfinite(values[0]):
            rankings.append(Ranking((), ()))
            continue
        rest = [(token, value) for token, value in zip(tokens, values, strict=True) if token != first]
        rest = [(token, value) for token, value in rest if value > -torch.inf][: count - 1]
        margins = (values[0] - value for _, value in rest)
        rankings.append(Ranking((first, *(token for token, _ in rest)), (0.0, *margins)))
    return rankings


def _best_noised(z_V: Tensor, key: int, count: int, first_token: int = 0) -> tuple[Tensor, Tensor]:
    """The `count` tokens (fewer where fewer are left) with the best noised scores, and these in float64, best first."""
    head = z_V.topk(min(max(_HEAD, count), z_V.numel()))
    if not math.isfinite(head.values[0]):  # to topk, NaN is the greatest of all
        return head.indices[:0], head.values[:0].double()
    head_score = head.values.double() + gumbel_noise(key, head.indices + first_token)
    # Whatever is below this bound even with the largest noise cannot be among the first `count`.
    bound = float(head_score.topk(min(count, len(head_score))).values[-1])
    if bound == -torch.inf:  # fewer than `count` tokens are left: all of them are in the head
        columns, score = head.indices, head_score
    else:
        # One part in 10^6 of slack, since z is float32 and the comparison must never drop a winner.
        columns = (z_V >= bound - MAX_NOISE - 1e-6 * (abs(bound) + MAX_NOISE)).nonzero().squeeze(1)
        score = z_V[columns].double() + gumbel_noise(key, columns + first_token)
    best = score.topk(min(count, columns.numel())).indices
    return columns[best] + first_token, score[best]


def scaled(logits_V: Tensor, temperature: float) -> Tensor:
    """Logits over the temperature, float32, rounded as `rank_tokens` rounds them on this device.

    On a GPU torch multiplies by the inverse of a number and divides by a tensor; the kernel divides.
    """
    if ops.compiled_for(logits_V.device):
        return logits_V.float() / torch.full((), temperature, dtype=torch.float32, device=logits_V.device)
    return logits_V.float() / temperature


def best_of_columns(z_RL: Tensor, choices: Sequence[Choice], first_token: int) -> tuple[Tensor, Tensor]:
    """What would be chosen at each row of some columns of the logits, without top-k, top-p and min-p.

    Args:
        z_RL: after the processors of processors.py, for the rows of all choices; L may be 0.
        first_token: what the first column stands for.

    Returns:
        Tokens (int64) and their scores, noised where the temperature is not 0 (float64); lower tokens win ties, and
        nothing to choose from is -1: with -inf where all is excluded, with NaN where a logit is NaN or +inf. On the
        device of the logits.
    """
    rows = row_by_row(choices)
    if z_RL.shape[1] and ops.compiled_for(z_RL.device):
        plain = [SamplingParams(one.params.temperature, seed=one.params.seed) for one in rows]
        tokens_RF, scores_RF = _sample(z_RL, plain, rows, 1, first_token)
        return tokens_RF[:, 0], scores_RF[:, 0]
    best = [_best_of_row(z_L, one, first_token) for z_L, one in zip(z_RL, rows, strict=True)]
    tokens_R = torch.tensor([-1 if score == -math.inf else token for token, score in best], dtype=torch.int64)
    scores_R = torch.tensor([score for _, score in best], dtype=torch.float64)
    return tokens_R.to(z_RL.device), scores_R.to(z_RL.device)


def _best_of_row(z_L: Tensor, choice: Choice, first_token: int) -> tuple[int, float]:
    if len(z_L) == 0:
        return -1, -math.inf
    most, column = z_L.max(dim=0)
    if most == -math.inf:
        return -1, -math.inf
    if choice.params.temperature == 0.0:
        return (int(column) + first_token, float(most)) if math.isfinite(most) else (-1, math.nan)
    tokens, scores = _best_noised(scaled(z_L, choice.params.temperature), choice.key, 1, first_token)
    return (int(tokens[0]), float(scores[0])) if len(tokens) else (-1, math.nan)
