"""Long runs of table models through the real engine: many requests at several temperatures in one batch."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ssd_runtime.config import EngineConfig, SpeculationConfig
from ssd_runtime.speculation.planning.planner import Planner
from ssd_runtime.speculation.types import SamplingParams
from tests.engines import InProcess, in_process, random_steps, request
from tests.enumeration import ChiSquare, counted, joint_law, next_tokens
from tests.tabular import TabularModel

LOOKAHEAD = 2
WINDOW = 3  # tokens that are judged together; a round emits at most as many, so most windows lie across two or more
TEMPERATURES = (0.3, 0.7, 1.0)
REQUESTS, TOKENS = 8, 151  # of each temperature; of each request
PROMPT = (3, 1, 2)
GREEDY = 0.0

Texts = dict[float, list[list[int]]]


@functools.cache
def models(size: int) -> tuple[TabularModel, TabularModel]:
    """A target that looks at one token, so that contexts are few, and a draft that looks at two and is often wrong."""
    generator = torch.Generator().manual_seed(size)
    target_VV = 0.5 * torch.randn(size, size, generator=generator)
    draft_VVV = 0.3 * target_VV + 0.7 * torch.randn(size, size, size, generator=generator)
    return TabularModel(target_VV.expand(size, size, size).contiguous()), TabularModel(draft_VVV)


@dataclass(frozen=True)
class Case:
    """How to speculate, and what must have happened.

    Attributes:
        vocab: tokens.
        speculation: changes to the configuration.
        steps: drafting steps that fit into a verification; None: 0 to 3, as it comes.
        hits: least and most share of rounds whose speculation came from the cache.
        num_drafts: drafts that divide the outcomes.
        planner: makes one, from the engine that it is to plan for.
    """

    vocab: int
    speculation: Mapping[str, object] = field(default_factory=dict)
    steps: int | None = 2
    mode: str = "ssd"
    hits: tuple[float, float] = (0.0, 1.0)
    num_drafts: int = 1
    planner: Callable[[], Planner] | None = None

    def engine(self, batch: int, tokens: int) -> InProcess:
        basis: dict[str, Any] = {"lookahead": LOOKAHEAD, "budget": 3, "recycle": 0, "fan_out": "uniform"}
        basis |= {"backup": "none", "coupling": "rejection", "top_m": self.vocab}
        return in_process(
            *models(self.vocab),  # type: ignore[arg-type]
            EngineConfig(max_model_len=len(PROMPT) + tokens, max_num_seqs=batch, block_size=16),
            SpeculationConfig(**(basis | dict(self.speculation))),
            random_steps(1, 3) if self.steps is None else self.steps,
            self.planner() if self.planner else None,
            self.num_drafts,
        )

    def run(
        self,
        label: str,
        temperatures: Sequence[float] = TEMPERATURES,
        requests: int = REQUESTS,
        tokens: int = TOKENS,
        batch: int = 64,
        prepare: Callable[[InProcess], None] = lambda process: None,
    ) -> Texts:
        """The texts of `requests` requests a temperature, one at temperature 0; their seeds follow from the label."""
        process = self.engine(batch, tokens)
        prepare(process)
        asked = [
            request(
                PROMPT,
                self.mode,
                lookahead=LOOKAHEAD,
                max_tokens=tokens,
                params=SamplingParams(temperature=temperature, seed=zlib.crc32(f"{label} {temperature} {i}".encode())),
                request_id=f"{temperature} {i}",
            )
            for temperature in temperatures
            for i in range(requests if temperature != GREEDY else 1)
        ]
        sequences = process.run(asked)  # type: ignore[arg-type]
        process.assert_all_blocks_are_back()
        rounds = sum(sequence.measured.rounds for sequence in sequences)
        hits = sum(sequence.measured.hits for sequence in sequences)
        assert self.hits[0] <= hits / rounds <= self.hits[1]
        texts: Texts = {temperature: [] for temperature in temperatures}
        for sequence in sequences:
            texts[sequence.request.params.temperature].append(sequence.tokens[len(PROMPT) :])
        return texts

    def law(self, temperature: float) -> Tensor:
        """The target's next token after every two tokens, float64 [V, V, V]."""
        return next_tokens(models(self.vocab)[0].table_VVV, temperature)

    def judge(self, texts: Texts) -> dict[float, dict[str, ChiSquare]]:
        """Of each temperature: every token given the two before it; WINDOW tokens given the one before them."""
        size = self.vocab
        return {
            temperature: {
                "single": ChiSquare.of(counted(some, size, 2, 1), self.law(temperature).reshape(size**2, size)),
                "joint": ChiSquare.of(counted(some, size, 1, WINDOW), joint_law(self.law(temperature)[0], WINDOW)),
            }
            for temperature, some in texts.items()
            if temperature != GREEDY
        }

    def greedy_text(self, tokens: int) -> list[int]:
        """What temperature 0 gives."""
        best_V = models(self.vocab)[0].table_VVV[0].argmax(dim=1).tolist()
        text = [PROMPT[-1]]
        for _ in range(tokens):
            text.append(best_V[text[-1]])
        return text[1:]
