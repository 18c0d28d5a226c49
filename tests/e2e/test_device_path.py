"""AR, SD and SSD end to end on a pretend device: the tokens of plain torch on the CPU, and how often the host waits.

Two builds are served: without CUDA kernels plain torch does everything; with them the kernels' CPU counterparts serve
the operators on the cache and on tokens. A read is counted where the host waits for a result of the device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from cuda_ext import ops
from ssd_runtime.config import EngineConfig, Numerics, SpeculationConfig
from ssd_runtime.draft.drafter import Drafter
from ssd_runtime.engine.engine import Engine
from ssd_runtime.engine.request import Request
from ssd_runtime.model.batch import RowBuilder
from ssd_runtime.model.load import decoder_from_weights
from ssd_runtime.speculation.sampling.ranking import Choice
from ssd_runtime.speculation.sampling.vocab_parallel import decide, report
from ssd_runtime.speculation.types import SamplingParams
from tests.engines import InProcess, in_process, random_steps, request
from tests.operators import use_operators
from tests.pretend_device import DEVICE, Impossible, PretendDevice, Tally
from tests.tiny_models import CPU, RandomWeights, tiny_architecture

Build = Literal["with kernels", "without kernels"]
MODES = ("ar", "sd", "sd-colocated", "ssd")
ENGINE = EngineConfig(max_model_len=96, max_num_seqs=4, block_size=8, prefill_chunk=11)


@functools.cache
def weights() -> tuple[RandomWeights, RandomWeights]:
    """A target and a relative of it that often agrees."""
    arch = tiny_architecture()
    target, draft = RandomWeights(arch, seed=1), RandomWeights(arch, seed=1)
    generator = torch.Generator().manual_seed(2)
    for name, tensor in draft._tensors.items():
        draft._tensors[name] = tensor + 0.05 * tensor.std() * torch.randn(tensor.shape, generator=generator)
    return target, draft


def use(monkeypatch: pytest.MonkeyPatch, build: Build) -> None:
    """From here on the operators are those of this build."""
    if build == "without kernels":
        use_operators(monkeypatch)
        return
    compiled = pytest.importorskip("cuda_ext.compiled", reason="cuda_ext._C is not built", exc_type=ImportError)
    use_operators(monkeypatch, compiled)
    monkeypatch.setattr(ops, "compiled_for", lambda device: True)


def engine_on(device: torch.device, numerics: Numerics = "fast", **speculation: Any) -> InProcess:
    """Nothing in it depends on the clock, so every run has the same forwards."""
    config = SpeculationConfig(**({"lookahead": 4, "budget": 5, "backup": "ngram"} | speculation))
    target, draft = (decoder_from_weights(source, "fp32", device) for source in weights())
    sizes = EngineConfig(**(vars(ENGINE) | {"numerics": numerics}))
    return in_process(target, draft, sizes, config, random_steps(3, most=5))


PLAIN = SamplingParams()
SAMPLED = SamplingParams(temperature=0.8, seed=1, top_k=30, top_p=0.9)
EDITED = SamplingParams(
    0.7, 2, min_p=0.02, repetition_penalty=1.3, presence_penalty=0.2, logit_bias=((5, 2.0), (7, -9.0))
)
BANNED = SamplingParams(banned_tokens=(1, 2, 3), min_tokens=5)


def asked(mode: str, *params: SamplingParams, max_tokens: int = 10, logprobs: int | None = None) -> list[Request]:
    return [
        request(tuple(range(3, 16 + i)), mode, params=one, request_id=str(i), logprobs=logprobs, max_tokens=max_tokens)
        for i, one in enumerate(params)
    ]


def came_out(process: InProcess, requests: list[Request]) -> list[tuple[Any, ...]]:
    """Everything that could differ, log-probabilities to the bit and the numbers of rounds and accepted tokens too."""
    sequences = process.run(requests)
    process.assert_all_blocks_are_back()
    assert not [sequence.failure for sequence in sequences if sequence.failure]
    logprobs = {name: [one for delta in deltas for one in delta.logprobs] for name, deltas in process.deltas.items()}
    return [
        (one.tokens, logprobs[one.request.request_id], one.measured.rounds, one.measured.accepted) for one in sequences
    ]


def on_both(
    monkeypatch: pytest.MonkeyPatch, build: Build, requests: list[Request], numerics: Numerics = "fast", **changes: Any
) -> list[list[tuple[Any, ...]]]:
    """What plain torch on the CPU gives, and what the device gives under this build."""
    with monkeypatch.context() as patch:
        use(patch, "without kernels")
        there = came_out(engine_on(CPU, numerics, **changes), requests)
    use(monkeypatch, build)
    with PretendDevice():
        return [there, came_out(engine_on(DEVICE, numerics, **changes), requests)]


@pytest.mark.parametrize(("mode", "build"), [*((mode, "with kernels") for mode in MODES), ("ssd", "without kernels")])
def test_a_device_gives_the_bits_of_plain_torch_on_the_cpu(mode, build, monkeypatch):
    for requests in (asked(mode, PLAIN), asked(mode, PLAIN, SAMPLED, EDITED, BANNED, logprobs=3)):
        host, device = on_both(monkeypatch, build, requests)
        assert device == host
        assert mode == "ar" or any(accepted for *_, accepted in device)


def test_windows_of_invariant_numerics_do_too(monkeypatch):
    host, device = on_both(monkeypatch, "with kernels", asked("ssd", PLAIN, SAMPLED), numerics="invariant")
    assert device == host


def test_rejection_sampling_does_too(monkeypatch):
    changes = {"coupling": "rejection", "top_m": 8, "saguaro_c": 0.5}
    host, device = on_both(monkeypatch, "with kernels", asked("ssd", PLAIN, SAMPLED, EDITED), **changes)
    assert device == host


@pytest.mark.parametrize("build", ["with kernels", "without kernels"])
def test_slices_of_the_vocabulary_do_too(build, monkeypatch):
    use(monkeypatch, build)
    logits_RV = torch.randn(2, 96, generator=torch.Generator().manual_seed(0))
    choices = [Choice(PLAIN, 10), Choice(SAMPLED, 10)]
    found = []
    for device in (CPU, DEVICE):
        with PretendDevice():
            halves = logits_RV.to(device).split(48, dim=1)
            reports = [report(half, choices, 48 * i, 96) for i, half in enumerate(halves)]
            found.append(decide(torch.stack(reports), choices, 96))
    assert found[0] == found[1] == [int(logits_RV[0].argmax()), found[0][1]]


@dataclass
class Ledger:
    """What went between host and device in an engine, by part of the work; parts inside others are apart."""

    rounds: list[Tally] = field(default_factory=list)
    prompts: list[Tally] = field(default_factory=list)
    steps: list[Tally] = field(default_factory=list)
    advances: list[Tally] = field(default_factory=list)

    def check(self, budget: dict[str, int], what: Literal["reads", "uploads"] = "reads") -> None:
        """Raise AssertionError, with the lines, unless the most of these in one such part are as many as this."""
        worst = {part: max(getattr(self, part), key=lambda tally: getattr(tally, what).total()) for part in budget}
        found = {part: getattr(tally, what).total() for part, tally in worst.items()}
        lines = [f"{what} are {found}, the budget says {budget}"]
        lines += [f"most of {part}:\n{worst[part].table()}" for part in budget if found[part] != budget[part]]
        assert found == budget, "\n".join(lines)


@pytest.fixture
def ledger(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ledger]:
    """Filled by what runs on the device, which is there, under the build with kernels."""
    use(monkeypatch, "with kernels")
    ledger = Ledger()
    with PretendDevice() as device:

        def tallied(owner: type, name: str, tallies: list[Tally]) -> None:
            does: Callable[..., Any] = getattr(owner, name)

            def counting(*arguments: Any) -> Any:
                with device.tallied() as tally:
                    tallies.append(tally)
                    return does(*arguments)

            monkeypatch.setattr(owner, name, counting)

        tallied(Engine, "step", ledger.rounds)
        tallied(Engine, "_prefill", ledger.prompts)
        tallied(Drafter, "grow", ledger.steps)
        tallied(Drafter, "advance", ledger.advances)
        yield ledger


# The most of one round of the target, one chunk of a prompt, one step of the draft, and one look of it at outcomes. To
# be lowered; who has to raise a number says here why. A round reads its tokens, and then whether a kernel met a fault.
READS = {"rounds": 2, "prompts": 1, "steps": 1, "advances": 1}
UPLOADS = {"rounds": 4, "prompts": 3, "steps": 4, "advances": 2}  # of one sequence, one of them for a new block


def test_one_sequence_waits_for_the_device_and_uploads_as_often_as_today(ledger):
    for mode in ("sd", "sd-colocated", "ssd"):
        came_out(engine_on(DEVICE), asked(mode, PLAIN))
    ledger.check(READS)
    ledger.check(UPLOADS, "uploads")


@pytest.mark.parametrize("mode", ["sd", "sd-colocated", "ssd"])
def test_several_wait_no_more_often_than_one(mode, ledger):
    came_out(engine_on(DEVICE), asked(mode, PLAIN, SAMPLED, SAMPLED))
    ledger.check(READS)


@pytest.mark.parametrize(("params", "logprobs", "more"), [(SAMPLED, None, 0), (EDITED, None, 0), (PLAIN, 3, 2)])
def test_plain_decoding_waits_as_often_and_twice_for_a_log_probability(params, logprobs, more, ledger):
    came_out(engine_on(DEVICE), asked("ar", params, logprobs=logprobs))
    ledger.check({part: READS[part] + more for part in ("rounds", "prompts")})


def test_a_read_that_someone_adds_to_a_forward_breaks_the_budget(ledger, monkeypatch):
    silu_mul = ops.silu_mul

    def looks(gate_up_N2F: Tensor) -> Tensor:
        assert gate_up_N2F.sum().isfinite().item()
        return silu_mul(gate_up_N2F)

    monkeypatch.setattr(ops, "silu_mul", looks)
    came_out(engine_on(DEVICE), asked("ssd", PLAIN))
    with pytest.raises(AssertionError, match=r"2 reads    0 uploads  ssd_runtime/model/decoder.py:\d+"):
        ledger.check(READS)


def test_rows_that_someone_leaves_on_the_host_are_refused(ledger, monkeypatch):
    begin = RowBuilder.__init__
    monkeypatch.setattr(RowBuilder, "__init__", lambda rows, device: begin(rows, CPU))
    with pytest.raises(Impossible, match=r"^ssd_runtime/model/decoder.py:\d+: aten.mul.Tensor takes tensors of"):
        came_out(engine_on(DEVICE), asked("ssd", PLAIN))
