"""Attention over the paged cache: by definition, and in memory that does not grow with rows times context.

Sums are float32. No operator reads a value on the host: how far rows see, which decides the shapes, the host knows.

Shape legend: N rows (tokens), M rows of a block, H query heads, G key-value heads, Q = H / G query heads to each of
them, D features, S slots, T slots that a row may see, C columns of a table or of the chains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MOST = 2**24  # elements of a tensor that has rows times context: 64 MiB of float32, three or four of which are alive


@dataclass(frozen=True, slots=True)
class Span:
    """The rows of one sequence in a forward, as the host knows them.

    Attributes:
        rows: how many, one after the other.
        reach: slots of the sequence's table that one of them may see; none sees more.
    """

    rows: int
    reach: int


def paged_attention(
    q_NHD: Tensor,
    kv_2SGD: Tensor,
    sequence_N: Tensor,
    tables_SC: Tensor,
    prefix_N: Tensor,
    chain_NC: Tensor,
    scale: float,
    spans: Sequence[Span],
) -> Tensor:
    """Attention of each row over its sequence's prefix and its own chain of slots, in float32.

    Args:
        q_NHD: queries; head h reads key-value head h // (H // G).
        kv_2SGD: one layer's keys and values by slot.
        sequence_N: which row of the tables a query belongs to, ascending.
        tables_SC: slots of each sequence in order.
        prefix_N: how many of them a query sees.
        chain_NC: further slots, one list a query, -1 for none.
        scale: factor on the scores.
        spans: the rows of each row of the tables, in order; their sum is N.

    Returns: NHD in the queries' dtype; a row that sees nothing is zero, and one that sees a value that is no number is
        NaN. What a row does not see, whatever it is, changes nothing.
    """
    counts = [span.rows for span in spans]
    assert sum(counts) == len(q_NHD), "spans are of all rows"
    reach = max((span.reach for span in spans), default=0)
    gathered = len(q_NHD) * (reach + chain_NC.shape[1]) * kv_2SGD[0, 0].numel()
    if gathered <= MOST and (len(spans) > 1 or len(q_NHD) == 1):
        return attention_by_rows(q_NHD, kv_2SGD, sequence_N, tables_SC, prefix_N, chain_NC, scale, reach)
    found = [q_NHD.new_empty(0, *q_NHD.shape[1:])]
    rows = (q_NHD.split(counts), prefix_N.split(counts), chain_NC.split(counts))
    for table_C, span, q_MHD, prefix_M, chain_MC in zip(tables_SC, spans, *rows, strict=True):
        found += _attend_span(q_MHD, kv_2SGD, table_C[: span.reach], prefix_M, chain_MC, scale)
    return torch.cat(found)


def attention_by_rows(
    q_NHD: Tensor,
    kv_2SGD: Tensor,
    sequence_N: Tensor,
    tables_SC: Tensor,
    prefix_N: Tensor,
    chain_NC: Tensor,
    scale: float,
    reach: int,
) -> Tensor:
    """The definition: every row gathers what it sees. Few operators for many sequences, memory of rows times context.

    Args: as `paged_attention`, the rows in any order.
        reach: the most slots of a table that a row sees.
    """
    num_rows, num_heads, head_dim = q_NHD.shape
    num_groups = kv_2SGD.shape[2]
    seen_NT = torch.arange(reach, device=q_NHD.device) < prefix_N[:, None]
    visible_NT = torch.cat((seen_NT, chain_NC >= 0), dim=1)
    slots_NT = torch.cat((tables_SC[sequence_N, :reach], chain_NC), dim=1).where(visible_NT, 0)
    keys_NTGD, values_NTGD = kv_2SGD[0, slots_NT].float(), kv_2SGD[1, slots_NT].float()
    hidden_NT11 = ~visible_NT[:, :, None, None]
    values_NTGD = values_NTGD.masked_fill(hidden_NT11, 0.0)  # a hidden slot may hold anything, even NaN
    q_NGQD = q_NHD.float().reshape(num_rows, num_groups, num_heads // num_groups, head_dim) * scale
    scores_NGQT = torch.einsum("ngqd,ntgd->ngqt", q_NGQD, keys_NTGD)
    scores_NGQT = scores_NGQT.masked_fill(~visible_NT[:, None, None, :], float("-inf"))
    weights_NGQT = torch.softmax(scores_NGQT, -1).masked_fill(~visible_NT.any(1)[:, None, None, None], 0.0)
    return torch.einsum("ngqt,ntgd->ngqd", weights_NGQT, values_NTGD).reshape(q_NHD.shape).to(q_NHD.dtype)


def _attend_span(
    q_NHD: Tensor, kv_2SGD: Tensor, slots_T: Tensor, prefix_N: Tensor, chain_NC: Tensor, scale: float
) -> list[Tensor]:
    """The rows of one sequence in blocks, over keys and values that are gathered once (in float32: 8 TGD bytes)."""
    keys_TGD, values_TGD = kv_2SGD.index_select(1, slots_T).float().unbind(0)
    # Values meet weights in one product for all rows, where a hidden NaN would count: 0 * NaN is NaN. So these become
    # zeros, and the rows that do see them become NaN afterwards.
    unfit_T = (values_TGD.flatten(1) * 0.0).sum(1).isnan()
    values_TGD.masked_fill_(unfit_T[:, None, None], 0.0)
    places_T = torch.arange(len(slots_T), device=slots_T.device)
    num_heads, depth = q_NHD.shape[1], chain_NC.shape[1]
    a_row = num_heads * (len(slots_T) + depth) + depth * kv_2SGD[:, 0].numel()  # its scores, and what its chain gathers
    most = max(1, MOST // max(1, a_row))
    found = []
    for q_MHD, prefix_M, chain_MC in zip(q_NHD.split(most), prefix_N.split(most), chain_NC.split(most), strict=True):
        visible_MT = places_T < prefix_M[:, None]
        chain = _gather_chains(kv_2SGD, chain_MC) if depth else None
        attended_MHD = _attend_block(q_MHD.float() * scale, keys_TGD, values_TGD, visible_MT, chain)
        attended_MHD.masked_fill_((visible_MT & unfit_T).any(1)[:, None, None], torch.nan)
        found.append(attended_MHD.to(q_NHD.dtype))
    return found


def _gather_chains(kv_2SGD: Tensor, chain_MC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values of each row's chain (MCGD), hidden values zero, and which are visible (MC)."""
    visible_MC = chain_MC >= 0
    keys_MCGD, values_MCGD = kv_2SGD[:, chain_MC.clamp_min(0)].float().unbind(0)
    return keys_MCGD, values_MCGD.masked_fill(~visible_MC[:, :, None, None], 0.0), visible_MC


def _attend_block(
    q_MHD: Tensor,
    keys_TGD: Tensor,
    values_TGD: Tensor,
    visible_MT: Tensor,
    chain: tuple[Tensor, Tensor, Tensor] | None,
) -> Tensor:
    """Softmax over what all rows share and, behind it, each row's own chain; float32 all of it."""
    num_rows, num_heads, head_dim = q_MHD.shape
    reach, num_groups, _ = keys_TGD.shape
    q_GMQD = q_MHD.view(num_rows, num_groups, num_heads // num_groups, head_dim).transpose(0, 1)
    flat_GXD = q_GMQD.reshape(num_groups, num_rows * (num_heads // num_groups), head_dim)  # X = M * Q
    scores_GMQT = torch.bmm(flat_GXD, keys_TGD.permute(1, 2, 0)).view(*q_GMQD.shape[:3], reach)
    if chain is not None:
        chain_keys_MCGD, chain_values_MCGD, visible_MC = chain
        scores_GMQC = torch.einsum("gmqd,mcgd->gmqc", q_GMQD, chain_keys_MCGD)
        scores_GMQT, visible_MT = torch.cat((scores_GMQT, scores_GMQC), -1), torch.cat((visible_MT, visible_MC), 1)
    scores_GMQT.masked_fill_(~visible_MT[:, None], -torch.inf)
    weights_GMQT = torch.softmax(scores_GMQT, -1)
    shared_GXT = weights_GMQT[..., :reach].reshape(*flat_GXD.shape[:2], reach)
    attended_GMQD = torch.bmm(shared_GXT, values_TGD.transpose(0, 1)).view(q_GMQD.shape)
    if chain is not None:
        attended_GMQD += torch.einsum("gmqc,mcgd->gmqd", weights_GMQT[..., reach:], chain_values_MCGD)
    attended_MHD = attended_GMQD.transpose(0, 1).reshape(num_rows, num_heads, head_dim)
    return attended_MHD.masked_fill_(~visible_MT.any(1)[:, None, None], 0.0)  # of nothing, the softmax is NaN
