"""Recorded text and what both models think at every position of it: all that Figures 3, 4 (hits) and 5 are made of.

The target writes each text by plain decoding. Then one pass of both models over it gives, for every position, the
draft's ranking under the target's noise, and what rejection sampling would do there. Where the draft disagrees with the
text, its own continuation is followed for K tokens more, since that is what a real speculation would have held. Nothing
here depends on time, so the results are the same on a busy machine.

Shape legend: R rows, V vocabulary, M tokens the draft may sample from.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from launcher.bench.scoring import BLOCK, CHUNK, Scorer
from launcher.study.coupling import Rejection, Rule, reject
from ssd_runtime.config import Config, EngineConfig, ModelConfig
from ssd_runtime.engine.engine import Engine
from ssd_runtime.engine.request import Request
from ssd_runtime.engine.speculator import NoSpeculation
from ssd_runtime.host.cores import Role
from ssd_runtime.model.decoder import Decoder
from ssd_runtime.model.files.catalogue import resolve
from ssd_runtime.model.load import load_decoder
from ssd_runtime.model.text.tokenizer import Tokenizer
from ssd_runtime.speculation.sampling.ranking import Choice, Ranking, rank_tokens
from ssd_runtime.speculation.types import SamplingParams
from ssd_runtime.trace import Tracer

WIDEST = 128  # the largest fan-out of Figure 3
AT_ONCE = 16  # sequences written together

Advance = Callable[[str], None]


@dataclass(frozen=True)
class Text:
    """What the target wrote: prompt and output tokens, and how they were sampled."""

    prompt: tuple[int, ...]
    output: tuple[int, ...]
    params: SamplingParams


@dataclass(frozen=True)
class Record:
    """One text; all sequences have one entry a token of the output.

    Attributes:
        chosen: the output.
        rankings: what the draft expects in its place, under the target's noise.
        ranks: where the draft ranks the token chosen; WIDEST + 1 if further down.
        beyond: where the draft's token is another one, its rankings after that token and its own continuation.
        rejection: what coupling "rejection" would do; None at temperature 0, where it does the same.
    """

    temperature: float
    chosen: tuple[int, ...]
    rankings: tuple[Ranking, ...]
    ranks: tuple[int, ...]
    beyond: dict[int, tuple[Ranking, ...]]
    rejection: Rejection | None


def write_texts(
    target: Decoder,
    prompts: Sequence[tuple[int, ...]],
    params: SamplingParams,
    max_tokens: int,
    eos_token_ids: tuple[int, ...],
    advance: Advance,
) -> list[Text]:
    """Let the target answer every prompt by plain decoding, AT_ONCE together; prompt i with seed `params.seed` + i."""
    length = max(map(len, prompts)) + max_tokens
    config = EngineConfig(max_model_len=length, max_num_seqs=min(AT_ONCE, len(prompts)), block_size=BLOCK)
    engine = Engine.on(target, config, 0, {"ar": NoSpeculation()}, Tracer("study", enabled=False))
    sequences = []
    for index, prompt in enumerate(prompts):
        own = replace(params, seed=params.seed + index)
        request = Request(uuid.uuid4().hex, prompt, own, "ar", 0, max_tokens, eos_token_ids=eos_token_ids)
        sequences.append(engine.add(request))
    while engine.has_work:
        for progressed in engine.step():
            if progressed.delta.finish_reason:
                advance("texts")
    return [
        Text(sequence.request.prompt_tokens, tuple(sequence.tokens[sequence.num_prompt :]), sequence.request.params)
        for sequence in sequences
    ]


@dataclass(frozen=True)
class Pass:
    """One pass of both models over a text.

    Attributes:
        vocab_size: tokens they share; what lies beyond is never drafted.
        lookahead: K.
        width: how many tokens of a ranking are kept, at least B + 1.
        rules: how a draft would sample under coupling "rejection".
    """

    target: Decoder
    draft: Decoder
    vocab_size: int
    lookahead: int
    width: int
    rules: Sequence[Rule]

    def record(self, text: Text) -> Record:
        """Score the text with both models."""
        tokens, first, count = (*text.prompt, *text.output), len(text.prompt), len(text.output)
        rankings: list[Ranking] = []
        rejections: list[Rejection] = []
        drafting = Scorer(self.draft, len(tokens), branches=count * self.lookahead)
        scores = zip(Scorer(self.target, len(tokens)).score(tokens, first), drafting.score(tokens, first), strict=True)
        for target_RV, draft_RV in scores:
            place = len(rankings)
            rankings += self._rank(draft_RV, text.params, first + place)
            if text.params.temperature > 0:
                chosen_R = torch.tensor(text.output[place : place + len(draft_RV)])
                draft_RV = self._shared(draft_RV, target_RV.shape[1])
                rejections.append(reject(target_RV, draft_RV, chosen_R, text.params, self.rules))
        differing = [i for i, ranking in enumerate(rankings) if ranking.tokens[0] != text.output[i]]
        ranks = [
            ranking.tokens.index(token) if token in ranking.tokens else WIDEST + 1
            for ranking, token in zip(rankings, text.output, strict=True)
        ]
        return Record(
            temperature=text.params.temperature,
            chosen=text.output,
            rankings=tuple(self._narrow(ranking) for ranking in rankings),
            ranks=tuple(ranks),
            beyond=self._beyond(drafting, {i: rankings[i].tokens[0] for i in differing}, text),
            rejection=Rejection.joined(rejections) if rejections else None,
        )

    def _beyond(self, drafting: Scorer, own: dict[int, int], text: Text) -> dict[int, tuple[Ranking, ...]]:
        """Rankings after the draft's own token at each place of `own`, and after what it would have gone on with."""
        tips = dict(own)
        chains: dict[int, list[int]] = {place: [] for place in own}
        found: dict[int, list[Ranking]] = {place: [] for place in own}
        for depth in range(self.lookahead):
            for start in range(0, len(tips), CHUNK):
                places, first = list(tips)[start : start + CHUNK], len(text.prompt)
                logits_RV = drafting.branch([(tips[i], first + i, chains[i]) for i in places])
                for row, place in enumerate(places):
                    (ranking,) = self._rank(logits_RV[row : row + 1], text.params, first + place + depth + 1)
                    found[place].append(self._narrow(ranking))
                    tips[place] = ranking.tokens[0]
        return {place: tuple(rankings) for place, rankings in found.items()}

    def _rank(self, logits_RV: Tensor, params: SamplingParams, position: int) -> list[Ranking]:
        choices = [Choice(params, position + row) for row in range(len(logits_RV))]
        return rank_tokens(logits_RV[:, : self.vocab_size].contiguous(), choices, max(WIDEST + 1, self.width))

    def _shared(self, draft_RV: Tensor, vocab_size: int) -> Tensor:
        """The draft's logits over the target's vocabulary."""
        shared_RV = draft_RV.new_full((len(draft_RV), vocab_size), -torch.inf)
        shared_RV[:, : self.vocab_size] = draft_RV[:, : self.vocab_size]
        return shared_RV

    def _narrow(self, ranking: Ranking) -> Ranking:
        return replace(ranking, tokens=ranking.tokens[: self.width], margins=ranking.margins[: self.width])


@dataclass(frozen=True)
class Pair:
    """Both models of a configuration, in this process."""

    target: Decoder
    draft: Decoder
    tokenizer: Tokenizer
    vocab_size: int  # that they share

    def prompt_tokens(self, prompt: str) -> tuple[int, ...]:
        """What a user says, inside the chat template."""
        chat = self.tokenizer.chat([{"role": "user", "content": prompt}])
        return tuple(self.tokenizer.encode(chat, add_special=False))


def load_pair(config: Config, progress: Callable[[Role, float], None]) -> Pair:
    """Load target and draft; raises ConfigError for what is wrong with their files."""
    torch.set_num_threads(config.target.threads)

    def load(role: Role, model: ModelConfig) -> Decoder:
        return load_decoder(resolve(model.model), model.dtype, torch.device(model.device), partial(progress, role))

    target, draft = load("target", config.target), load("draft", config.draft)
    words, others = (Tokenizer.from_model(resolve(model.model)) for model in (config.target, config.draft))
    sizes = len(others.vocabulary().tokens), draft.arch.vocab_size, target.arch.vocab_size
    return Pair(target, draft, words, min(sizes))
