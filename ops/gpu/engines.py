"""A real model in engines of every mode, alone and four at once, in both numerics: are the tokens the same?

The file is checked first. Target and draft are the same weights in bfloat16, in one process; the draft takes as many
steps a verification as a seed says, so that there are hits and misses.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launcher.bench.prompts import read_prompts
from ops.gpu.carry import sha256
from ops.gpu.result import Finding, Number, Setting, judged, run_step
from ops.gpu.timing import device_of
from ssd_runtime.config import MODES, NUMERICS, EngineConfig, Mode, Numerics, SpeculationConfig
from ssd_runtime.engine.request import Request
from ssd_runtime.model.decoder import Decoder
from ssd_runtime.model.files.catalogue import CATALOGUE, resolve
from ssd_runtime.model.load import load_decoder
from ssd_runtime.model.text.tokenizer import Tokenizer
from ssd_runtime.speculation.types import SamplingParams
from tests.engines import in_process, random_steps, request

LABEL = "On a GPU, numerics = fast promises no equal tokens: how many outputs differ is a measurement there."
TEMPERATURES = (0.0, 0.7)
LOOKAHEAD = 5
Outputs = list[tuple[int, ...]]


@dataclass(frozen=True)
class Work:
    """What all engines are given."""

    target: Decoder
    draft: Decoder
    prompts: tuple[tuple[int, ...], ...]
    max_tokens: int

    def run(self, mode: Mode, numerics: Numerics, batch: int) -> Outputs:
        """The outputs of all prompts, so many at once, in their order."""
        engine = EngineConfig(max_model_len=512, max_num_seqs=batch, prefill_chunk=64, numerics=numerics)
        speculation = SpeculationConfig(lookahead=LOOKAHEAD, budget=8)
        process = in_process(self.target, self.draft, engine, speculation, random_steps(3))
        asked = [self._request(index, mode) for index in range(len(self.prompts))]
        found = []
        for start in range(0, len(asked), batch):
            found += process.run(asked[start : start + batch])
        process.assert_all_blocks_are_back()
        return [tuple(sequence.tokens[sequence.num_prompt :]) for sequence in found]

    def _request(self, index: int, mode: Mode) -> Request:
        params = SamplingParams(temperature=TEMPERATURES[index % 2], seed=index)
        lookahead = 0 if mode == "ar" else LOOKAHEAD
        name = f"{mode}-{index}"
        return request(
            self.prompts[index], mode, lookahead=lookahead, max_tokens=self.max_tokens, params=params, request_id=name
        )


def find(setting: Setting) -> Iterator[Finding]:
    path, device = resolve(setting.model), device_of(setting)
    if setting.model in CATALOGUE:
        yield judged("SHA-256 of the file", sha256(Path(path)) == CATALOGUE[setting.model].sha256)
    start = time.monotonic()
    target, draft = (load_decoder(path, "bf16", device) for _ in range(2))
    yield Finding("target and draft loaded", (Number("seconds", time.monotonic() - start, "s"),))
    work = Work(target, draft, _prompts(path), 8 if setting.small else 48)
    for numerics in NUMERICS:
        promised = numerics == "invariant" or target.row_invariant
        plain = work.run("ar", numerics, 1)
        for batch in (1, len(work.prompts)):
            for mode in MODES:
                start = time.monotonic()
                outputs = work.run(mode, numerics, batch)
                differing = sum(output != expected for output, expected in zip(outputs, plain, strict=True))
                numbers = Number("outputs that differ", differing), Number("of", len(plain))
                seconds = Number("seconds", time.monotonic() - start, "s")
                yield judged(f"{mode} x{batch}, {numerics}", not (promised and differing), *numbers, seconds)


def _prompts(path: str) -> tuple[tuple[int, ...], ...]:
    tokenizer = Tokenizer.from_model(path)
    chats = [tokenizer.chat([{"role": "user", "content": prompt.prompt}]) for prompt in read_prompts(None, 4)]
    return tuple(tuple(tokenizer.encode(chat, add_special=False)) for chat in chats)


if __name__ == "__main__":
    raise SystemExit(run_step(__file__, __doc__, find, (LABEL,)))
