"""What a forward computes and chooses, as int64 words for the other target ranks, and back.

Floats travel by their bits. `encode_...` and `decode_...` are inverse to each other up to what nobody looks at: of the
sampling parameters only those of ranking.py travel, the rest being in the processors' tally. Knows no wire.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor

from cuda_ext.ops import Span
from ssd_runtime.errors import PeerLost
from ssd_runtime.model.batch import ForwardBatch
from ssd_runtime.speculation.noise import signed
from ssd_runtime.speculation.sampling.processors import LogitsProcessors, Tally
from ssd_runtime.speculation.sampling.ranking import Choice
from ssd_runtime.speculation.types import SamplingParams

_CPU = torch.device("cpu")


def encode_batch(batch: ForwardBatch, block_size: int) -> Tensor:
    """A batch as int64 words: the five sizes, spans of the sequences, then rows, blocks of the tables, chains, wanted
    rows."""
    num_rows, depth = batch.chain_ND.shape
    num_sequences, reach = batch.tables_SC.shape
    wanted_R = batch.logit_rows_R
    sizes = [num_rows, num_sequences, reach, depth, -1 if wanted_R is None else len(wanted_R)]
    blocks_SB = batch.tables_SC[:, ::block_size] // block_size
    rows = (batch.tokens_N, batch.positions_N, batch.slots_N, batch.sequence_N, batch.prefix_N)
    parts = [*rows, blocks_SB.flatten(), batch.chain_ND.flatten()]
    if wanted_R is not None:
        parts.append(wanted_R)
    spans = [number for span in batch.spans for number in (span.rows, span.reach)]
    return torch.cat((torch.tensor(sizes + spans), torch.cat(parts).to(_CPU)))


def decode_batch(words: Tensor, block_size: int, device: torch.device) -> ForwardBatch:
    """What `encode_batch` was given, on `device`; raises PeerLost for words that are no batch."""
    num_rows, num_sequences, reach, depth, wanted = words[:5].tolist()
    num_blocks = -(-reach // block_size)
    lengths = [num_rows] * 5 + [num_sequences * num_blocks, num_rows * depth, max(0, wanted)]
    if len(words) != 5 + 2 * num_sequences + sum(lengths):
        raise PeerLost("target", 0, -1, f"a frame of {len(words)} words does not hold a batch of {words[:5].tolist()}")
    spans, rest = words[5:].split([2 * num_sequences, sum(lengths)])
    tokens_N, positions_N, slots_N, sequence_N, prefix_N, blocks, chains, wanted_R = rest.to(device).split(lengths)
    offsets = torch.arange(block_size, device=device)
    tables_SC = (blocks[:, None] * block_size + offsets).view(num_sequences, -1)[:, :reach]
    return ForwardBatch(
        tokens_N=tokens_N,
        positions_N=positions_N,
        slots_N=slots_N,
        sequence_N=sequence_N,
        tables_SC=tables_SC.contiguous(),
        prefix_N=prefix_N,
        chain_ND=chains.view(num_rows, depth),
        spans=tuple(Span(rows, reach) for rows, reach in spans.view(-1, 2).tolist()),
        logit_rows_R=None if wanted < 0 else wanted_R,
    )


def encode_choices(choices: Sequence[Choice]) -> Tensor:
    """The number of choices; of each nine words, its speculated tokens, and the tally of its processors if it has any.

    Temperature, top_p and min_p are three of the nine, as bits; the others: top_k, seed, position, first and number of
    rows, speculated tokens or -1 where there are no processors to look at them.
    """
    words: list[int] = [len(choices)]
    for choice in choices:
        params, rows = choice.params, choice.rows
        words += _bits((params.temperature, params.top_p, params.min_p))
        words += params.top_k, signed(params.seed), choice.position, rows.start, len(rows)
        if choice.processors is None:
            words.append(-1)
            continue
        speculated = choice.speculated[: rows.stop - 1] if rows else ()
        words += len(speculated), *speculated, *_tally_words(choice.processors.tally)
    return torch.tensor(words, dtype=torch.int64)


def decode_choices(words: Tensor, vocab_size: int) -> list[Choice]:
    """What `encode_choices` was given; raises PeerLost for words that are no choices."""
    reader = iter(words.tolist())
    try:
        choices = [_choice(reader, vocab_size) for _ in range(next(reader))]
    except StopIteration:
        choices = None
    if choices is None or next(reader, None) is not None:
        raise PeerLost("target", 0, -1, f"a frame holds {len(words)} words that do not say what to choose")
    return choices


def _choice(reader: Iterator[int], vocab_size: int) -> Choice:
    temperature, top_p, min_p = _floats(_take(reader, 3))
    top_k, seed, position, first, count, num_speculated = _take(reader, 6)
    params = SamplingParams(temperature, top_k, top_p, min_p, seed)
    rows = range(first, first + count)
    if num_speculated < 0:
        return Choice(params, position, rows)
    speculated = tuple(_take(reader, num_speculated))
    return Choice(params, position, rows, speculated, LogitsProcessors(_tally(reader), vocab_size))


def _tally_words(tally: Tally) -> list[int]:
    allowed = tally.allowed
    return [
        *_bits((tally.repetition_penalty, tally.frequency_penalty, tally.presence_penalty)),
        *(tally.num_output, tally.min_tokens, len(tally.counts), len(tally.bias)),
        *(-1 if allowed is None else len(allowed), len(tally.banned), len(tally.end_tokens)),
        *chain(tally.counts, tally.counts.values(), tally.bias, _bits(tally.bias.values())),
        *chain(allowed or (), tally.banned, tally.end_tokens),
    ]


def _tally(reader: Iterator[int]) -> Tally:
    repetition, frequency, presence = _floats(_take(reader, 3))
    num_output, min_tokens, num_counted, num_biased, num_allowed, num_banned, num_ends = _take(reader, 7)
    counted, counts = _take(reader, num_counted), _take(reader, num_counted)
    biased, bias = _take(reader, num_biased), _floats(_take(reader, num_biased))
    return Tally(
        repetition,
        frequency,
        presence,
        counts=dict(zip(counted, counts, strict=True)),
        num_output=num_output,
        bias=dict(zip(biased, bias, strict=True)),
        allowed=None if num_allowed < 0 else tuple(_take(reader, num_allowed)),
        banned=tuple(_take(reader, num_banned)),
        end_tokens=tuple(_take(reader, num_ends)),
        min_tokens=min_tokens,
    )


def _take(reader: Iterator[int], count: int) -> list[int]:
    return [next(reader) for _ in range(count)]


def _bits(values: Iterable[float]) -> list[int]:
    found: list[int] = torch.tensor(list(values), dtype=torch.float64).view(torch.int64).tolist()
    return found


def _floats(bits: list[int]) -> list[float]:
    found: list[float] = torch.tensor(bits, dtype=torch.int64).view(torch.float64).tolist()
    return found
