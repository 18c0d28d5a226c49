"""One model over one given text, in this process: the logits at its tokens, and how near a tie was. Knows no engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from launcher.bench.divergence import Divergence
from launcher.bench.prompts import Prompt
from ssd_runtime.config import Config
from ssd_runtime.kv.pool import BlockAllocator
from ssd_runtime.kv.table import BlockTable
from ssd_runtime.model.batch import RowBuilder
from ssd_runtime.model.decoder import Decoder
from ssd_runtime.model.files.catalogue import resolve
from ssd_runtime.model.load import load_decoder
from ssd_runtime.model.text.tokenizer import Tokenizer
from ssd_runtime.speculation.noise import gumbel_noise, noise_key
from ssd_runtime.speculation.sampling.ranking import process_logits
from ssd_runtime.speculation.types import SamplingParams

BLOCK = 16
CHUNK = 64  # rows of one forward: few enough that their logits fit anywhere


class Scorer:
    """One sequence in a KV pool of its own.

    Args:
        decoder: the model.
        length: most tokens of the text.
        branches: most tokens that leave it (`branch`).
    """

    def __init__(self, decoder: Decoder, length: int, branches: int = 0) -> None:
        blocks = -(-length // BLOCK)
        self._decoder = decoder
        self._kv = decoder.new_kv(blocks * BLOCK + branches)
        self._scratch = blocks * BLOCK
        self._table = BlockTable(BlockAllocator(blocks), BLOCK, length, decoder.device)
        self._table.reserve(length)

    def score(self, tokens: Sequence[int], first: int) -> Iterator[Tensor]:
        """Logits of the rows that choose the tokens from position `first` (at least 1) on, in chunks, float32 RV."""
        bounds = [*range(0, first - 1, CHUNK), *range(first - 1, len(tokens) - 1, CHUNK), len(tokens) - 1]
        for start, end in pairwise(bounds):
            rows = RowBuilder(self._decoder.device)
            rows.begin_sequence(self._table)
            rows.add_trunk(tokens[start:end], start)
            if start >= first - 1:
                rows.want_logits(end - start)
            logits_RV = self._decoder.forward(rows.build(), self._kv)
            if start >= first - 1:
                yield logits_RV

    def branch(self, tips: Sequence[tuple[int, int, list[int]]]) -> Tensor:
        """Logits after tokens that leave the text already scored, float32 RV.

        Args:
            tips: a token, the position where its branch leaves the text, and the slots of the branch so far; the
                token's own slot is added to them.
        """
        rows = RowBuilder(self._decoder.device)
        rows.begin_sequence(self._table)
        for token, leaves, chain in tips:
            position = leaves + len(chain)
            chain.append(self._scratch)
            self._scratch += 1
            rows.add_branch_row(token, position, leaves, tuple(chain))
            rows.want_logits()
        return self._decoder.forward(rows.build(), self._kv)


def logit_gap(decoder: Decoder, text: Sequence[int], tokens: tuple[int, int], params: SamplingParams) -> float:
    """How far apart the scores of two tokens are that may follow a text, in logits: noise times temperature included.

    Positive where the first has the higher score. One forward over the whole text, so its rounding is its own.
    """
    (logits_RV,) = list(Scorer(decoder, len(text) + 1).score((*text, tokens[0]), len(text)))
    a, b = tokens
    z_V = process_logits(logits_RV[-1], replace(params, top_k=0, top_p=1.0, min_p=0.0))  # which may exclude one
    gap = float(z_V[a] - z_V[b])
    if params.temperature == 0.0:
        return gap
    key = noise_key(params.seed, len(text))
    noise = [float(gumbel_noise(key, z_V.new_tensor(token).long())) for token in tokens]
    return (gap + noise[0] - noise[1]) * params.temperature


def gap_of_divergence(
    where: Divergence, config: Config, prompts: Sequence[Prompt], params: SamplingParams
) -> float | None:
    """The gap between the two tokens of a benchmark's first divergence; None where one of the outputs had ended.

    Loads the target in this process.

    Args:
        where: the first divergence of a report.
        params: of the benchmark; prompt i has seed `params.seed` + i.
    """
    first, second = where.tokens
    if first is None or second is None:
        return None
    path, index = resolve(config.target.model), where.prompt_index
    tokenizer = Tokenizer.from_model(path)
    chat = tokenizer.chat([{"role": "user", "content": prompts[index].prompt}])
    text = (*tokenizer.encode(chat, add_special=False), *where.before)
    decoder = load_decoder(path, config.target.dtype, torch.device(config.target.device))
    return logit_gap(decoder, text, (first, second), replace(params, seed=params.seed + index))
