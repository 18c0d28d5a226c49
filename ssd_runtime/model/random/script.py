"""Scripted text: what random models say, so that a draft and a target with nothing in common agree as often as asked.

The forward of such a model is computed, then some of its logits are replaced, on its device and without reading
anything back. What is promised:

- The script has one token at every position, the same for all prompts, seeds and models of one vocabulary size: a
  word, never an end. It repeats after PERIOD tokens.
- A model's first token is the script's at a share of the positions, its `agreement`: at so many of each HUNDRED, drawn
  once. Elsewhere another word is first, and the script's is not among the F words behind that with chance
  SCALE * F ** -EXPONENT, the law of Figure 3 of arXiv 2603.03251 at temperature 0.
- Neither the first token nor which CANDIDATES follow it depends on noise at temperatures up to 3. At temperature 0
  their order is the law's; noise shuffles it, as it does with real models. The r-th of them lies log r below the first,
  so that a fan-out policy by margins sees a fall that fits the law. It does not see where the draft errs: the margin of
  its first token is always large.
- The other logits are the model's own: where its forward goes wrong and gives NaN, the row fails.

Knows no weights and no sequences.

Shape legend: P positions, R rows whose logits are wanted, L columns (V, or a rank's part of them), C candidates.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssd_runtime.model.batch import ForwardBatch
from ssd_runtime.model.decoder import Decoder
from ssd_runtime.model.random.models import FIRST_WORD
from ssd_runtime.speculation.noise import hash_tokens

HUNDRED = 100
PERIOD = 1000 * HUNDRED
CANDIDATES = 32  # words with raised logits
SCALE, EXPONENT = 0.38, 0.75
_FIRST, _OTHERS = 200.0, 100.0  # logits; noise spans 26 times the temperature, a random model's own logits less than 10
_WORDS, _COINS = 0x776F_7264, 0x636F_696E  # keys


class Script:
    """What a model of this vocabulary and agreement is to say at each position.

    Args:
        vocab_size: of the whole model.
        agreement: 0 to 1.
        device: of the logits.
    """

    def __init__(self, vocab_size: int, agreement: float, device: torch.device) -> None:
        self._num_words = vocab_size - FIRST_WORD
        positions_P = torch.arange(PERIOD)  # on the CPU, so that rounding is the same for every device
        self._words_P = hash_tokens(_WORDS, positions_P).remainder(self._num_words).to(device)
        self._places_P = _places(hash_tokens(_COINS, positions_P), agreement).to(device)
        places_C = torch.arange(CANDIDATES)
        self._logits_C = torch.where(places_C == 0, _FIRST, _OTHERS - places_C.clamp(min=1).log()).to(device)
        self._places_C = places_C.to(device)

    def write_(self, logits_RL: Tensor, positions_R: Tensor, first_token: int = 0) -> Tensor:
        """Replace the logits of the candidates, in place; returns the tensor.

        Args:
            positions_R: of the tokens that these logits choose.
            first_token: what the first column stands for.
        """
        at_R = positions_R.remainder(PERIOD)
        place_R1 = self._places_P[at_R, None]
        words_RC = (self._words_P[at_R, None] + self._places_C).remainder(self._num_words)
        columns_RC = words_RC + (FIRST_WORD - first_token)
        # The first candidate is the script's word, at its place; the others fill the places before and behind.
        others_RC = torch.where(self._places_C <= place_R1, self._places_C - 1, self._places_C)
        values_RC = self._logits_C[torch.where(self._places_C == 0, place_R1, others_RC)]
        last = logits_RL.shape[1] - 1
        values_RC = values_RC.masked_fill((columns_RC < 0) | (columns_RC > last), -torch.inf)  # another rank has it
        return logits_RL.scatter_reduce_(1, columns_RC.clamp(0, last), values_RC, "amax")


def _places(bits_P: Tensor, agreement: float) -> Tensor:
    """Where the script's word is among the candidates: 0 is first (int64 P)."""
    order_P = bits_P.view(-1, HUNDRED).argsort(dim=1).argsort(dim=1).flatten()  # a permutation of each hundred
    uniform_P = (order_P + 0.5) / HUNDRED
    left_P = (1.0 - uniform_P).div(1.0 - agreement)  # above 1 with chance `agreement`, else uniform; inf without a rest
    behind_P = (SCALE / left_P).pow(1.0 / EXPONENT).ceil().clamp(1, CANDIDATES - 1).long()
    return torch.where(left_P > 1.0, 0, behind_P)


class ScriptedDecoder(Decoder):
    """A decoder that computes everything and says what the script wants.

    Args:
        agreement: as of `Script`.
        parts: what `Decoder` is made of.
    """

    def __init__(self, agreement: float, *parts: Any) -> None:
        super().__init__(*parts)
        self._script = Script(self.arch.vocab_size, agreement, self.device)
        self._first_token = self.shard.plan.vocabulary[0] if self.shard else 0

    @torch.inference_mode()
    def forward_part(self, batch: ForwardBatch, kv_L2SGD: Tensor) -> Tensor:
        """As `Decoder.forward_part`, of its time, with the script's logits."""
        logits_RL = super().forward_part(batch, kv_L2SGD)
        rows_R = batch.logit_rows_R
        positions_R = batch.positions_N if rows_R is None else batch.positions_N.index_select(0, rows_R)
        return self._script.write_(logits_RL, positions_R + 1, self._first_token)
