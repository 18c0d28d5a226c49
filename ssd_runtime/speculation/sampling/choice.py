"""Which tokens a target chooses at the rows of a forward: by which parameters, processors and texts. Knows no ranks.

`choose` is the definition, on logits of the whole vocabulary; vocab_parallel.py does the same where each process has
some of the columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ssd_runtime.speculation.sampling.processors import LogitsProcessors, process_rows
from ssd_runtime.speculation.sampling.ranking import Draw, choose_tokens
from ssd_runtime.speculation.types import SamplingParams


@dataclass(frozen=True)
class Choice:
    """Tokens to be chosen at consecutive rows of one sequence, one more speculated token before each.

    Attributes:
        params: of the request.
        position: absolute position of the token that is chosen with no speculated token before it.
        rows: how many speculated tokens are before each row.
        speculated: tokens between the text that the processors have counted and the rows, as many as the last row has
            before it or more; looked at by the processors alone.
        processors: of the sequence; None if it has none.
    """

    params: SamplingParams
    position: int
    rows: range = range(1)
    speculated: tuple[int, ...] = ()
    processors: LogitsProcessors | None = None

    @property
    def draws(self) -> list[Draw]:
        return [Draw(self.params, self.position + row) for row in self.rows]

    @property
    def texts(self) -> list[tuple[LogitsProcessors | None, tuple[int, ...]]]:
        """What `process_rows` takes of each row."""
        if self.processors is None:
            return [(None, ())] * len(self.rows)
        return [(self.processors, self.speculated[:row]) for row in self.rows]

    def part(self, rows: slice) -> Choice:
        """The same for some of the rows."""
        return replace(self, rows=self.rows[rows])

    def within(self, start: int, stop: int) -> Choice:
        """The same for a slice of the vocabulary, with tokens counted from its start."""
        if self.processors is None:
            return self
        shifted = tuple(token - start for token in self.speculated)
        return replace(self, speculated=shifted, processors=self.processors.within(start, stop))


def count_rows(choices: Sequence[Choice]) -> int:
    return sum(len(choice.rows) for choice in choices)


def processed(logits_RV: Tensor, choices: Sequence[Choice]) -> Tensor:
    """Logits after the processors of each row, [R, V]; the same tensor if no row has any."""
    return process_rows(logits_RV, [text for choice in choices for text in choice.texts])


def choose(logits_RV: Tensor, choices: Sequence[Choice]) -> list[int]:
    """The token chosen at each row, from the model's logits of the rows of all choices in order."""
    if not choices:
        return []
    return choose_tokens(processed(logits_RV, choices), [draw for choice in choices for draw in choice.draws])
