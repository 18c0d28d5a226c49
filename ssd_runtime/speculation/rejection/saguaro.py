"""Saguaro sampling: take draft mass off the tokens that are prepared for, so that the residual puts mass on them.

Definition 14 of arXiv 2603.03251: sigma_{F,C}(z)_t is proportional to C exp(z_t) for t in top_F(z), to exp(z_t)
otherwise. The residual max(p - q, 0) grows on exactly the tokens that are forked for: the hit rate rises as C falls,
the acceptance falls. Lossless if verification uses the modified q (Theorem 15), which is why the scaled distribution
itself is what the draft samples from and sends. (The official code scales F + 1 tokens.)

A pure function of logits. Knows no noise and no trees.
"""

from __future__ import annotations

import math

from torch import Tensor


def saguaro_logits(logits_RV: Tensor, c: float, f: int) -> Tensor:
    """The logits with log(c) added to the f largest of each row; softmax of the result is sigma_{F,C}.

    Args:
        logits_RV: processed logits (temperature and filters applied), any float dtype; excluded tokens are -inf.
        c: C, the factor, 0 to 1; 1 changes nothing.
        f: F, how many of the likeliest tokens it applies to.

    Returns:
        A new tensor of the same shape. Where c = 0 would leave a row without any token, the row is unchanged: with all
        of its tokens scaled alike the distribution stays what it was.
    """
    if not 0.0 <= c <= 1.0:
        raise ValueError(f"C must be between 0 and 1, not {c}")
    if f < 0:
        raise ValueError(f"F must be 0 or more, not {f}")
    top_RF = logits_RV.topk(min(f, logits_RV.shape[-1]), dim=-1).indices
    shift = math.log(c) if c > 0.0 else -math.inf
    scaled_RV = logits_RV.scatter(-1, top_RF, logits_RV.gather(-1, top_RF) + shift)
    emptied_R1 = scaled_RV.isneginf().all(dim=-1, keepdim=True)
    return logits_RV.where(emptied_R1, scaled_RV)
