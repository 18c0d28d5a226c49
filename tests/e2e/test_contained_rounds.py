"""What goes wrong inside a round fails the sequences concerned, and only them; the others' tokens stay exact."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from ssd_runtime.config import EngineConfig, SpeculationConfig
from ssd_runtime.engine.request import Request
from ssd_runtime.errors import PeerLost
from ssd_runtime.kv.pool import OutOfBlocks
from ssd_runtime.model.batch import ForwardBatch
from ssd_runtime.speculation.types import SamplingParams
from tests.engines import InProcess, in_process, request
from tests.tabular import TabularModel

MODES = ("ar", "sd", "sd-colocated", "ssd")
VOCAB, BAD = 12, 7
ENGINE = EngineConfig(max_model_len=64, max_num_seqs=4, block_size=4, prefill_chunk=8)
PROMPTS = ((1, 2, 3), (4, 5, 6, 8, 9, 1, 2, 3, 4, 5), (9, 1))
GOOD = SamplingParams(banned_tokens=(BAD,), temperature=0.8, seed=4)


class Delicate(TabularModel):
    """Raises what `ails` says of a forward's tokens."""

    def __init__(self, table_VVV: Tensor, ails: Callable[[list[int]], Exception | None]) -> None:
        super().__init__(table_VVV)
        self._ails = ails

    def forward(self, batch: ForwardBatch, kv_L2SGD: Tensor) -> Tensor:
        error = self._ails(batch.tokens_N.tolist())
        if error is not None:
            raise error
        return super().forward(batch, kv_L2SGD)


@functools.cache
def table(seed: int = 0) -> Tensor:
    """The likeliest path from the first prompt comes to the bad token after a dozen others."""
    return 2.0 * torch.randn(VOCAB, VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed))


def spoilt() -> Tensor:
    """Behind the bad token nothing can be chosen."""
    found = table().clone()
    found[:, BAD] = torch.nan
    return found


@dataclass(frozen=True)
class Ended:
    """How a sequence ended, and what was told of it."""

    tokens: tuple[int, ...]
    told: tuple[int, ...]
    reason: str | None
    failure: str | None


def serve(
    target: TabularModel,
    asked: Sequence[Request],
    draft: TabularModel | None = None,
    before: Callable[[InProcess], None] = lambda process: None,
    **speculation: object,
) -> list[Ended]:
    """Serve all at once; every block must come back on both sides."""
    config = SpeculationConfig(**({"lookahead": 3, "budget": 6} | speculation))  # type: ignore[arg-type]
    process = in_process(target, draft or TabularModel(table(1) + table()), ENGINE, config)  # type: ignore[arg-type]
    before(process)
    told: dict[str, list[int]] = {one.request_id: [] for one in asked}
    failures: dict[str, str] = {}
    sequences = [process.engine.add(one) for one in asked]
    for _ in range(500):
        for progressed in process.engine.step():
            request_id = progressed.sequence.request.request_id
            assert request_id not in failures, "nothing is told after a failure"
            told[request_id] += progressed.delta.token_ids
            if progressed.failure is not None:
                assert progressed.delta.finish_reason == "abort"
                failures[request_id] = progressed.failure
    assert not process.engine.has_work
    process.assert_all_blocks_are_back()
    assert process.draft.drafter.num_sequences == process.colocated.num_sequences == 0
    assert process.link.drafts.num_lost == 0
    return [
        Ended(
            tuple(one.tokens[one.num_prompt :]),
            tuple(told[one.request.request_id]),
            one.finish_reason,
            failures.get(one.request.request_id),
        )
        for one in sequences
    ]


def victim(mode: str, **changes: object) -> Request:
    return request(PROMPTS[0], mode, max_tokens=40, request_id="victim", **changes)


def bystanders(mode: str) -> list[Request]:
    return [
        request(prompt, mode, max_tokens=30, params=GOOD, request_id=f"{mode} {index}")
        for index, prompt in enumerate(PROMPTS)
    ]


@functools.cache
def unharmed() -> list[Ended]:
    return serve(TabularModel(table()), bystanders("ar"))


@functools.cache
def last_words() -> Ended:
    """What plain decoding gives the victim before it comes to the bad token."""
    (alone,) = serve(TabularModel(spoilt()), [victim("ar")])
    return alone


@pytest.mark.parametrize("coupling", ["shared-noise", "rejection"])
@pytest.mark.parametrize("mode", MODES)
def test_logits_that_are_no_numbers_fail_one_sequence_behind_the_same_text_in_every_mode(
    mode: str, coupling: str
) -> None:
    one, *others = serve(TabularModel(spoilt()), [victim(mode), *bystanders("ar")], coupling=coupling)
    assert one == last_words()
    assert one.tokens == one.told
    assert one.tokens[-1] == BAD
    assert len(one.tokens) > 4
    assert one.failure is not None
    assert f"no token can be chosen at position {len(PROMPTS[0]) + len(one.tokens)}" in one.failure
    assert [other.failure for other in others] == [None] * 3
    if coupling == "shared-noise":
        assert others == unharmed()


@pytest.mark.parametrize("mode", MODES)
def test_a_prompt_whose_logits_are_no_numbers_fails_before_the_first_token(mode: str) -> None:
    asked = request((1, BAD), mode, request_id="victim")
    one, *others = serve(TabularModel(spoilt()), [asked, *bystanders(mode)])
    assert one.tokens == ()
    assert one.failure is not None
    assert others == unharmed()


def test_an_end_token_before_such_logits_is_an_end_like_any_other() -> None:
    for mode in MODES:
        (one,) = serve(TabularModel(spoilt()), [victim(mode, eos_token_ids=(BAD,))])
        assert (one.tokens, one.reason, one.failure) == (last_words().tokens, "stop", None)


@pytest.mark.parametrize("mode", MODES)
def test_log_probabilities_that_are_no_numbers_are_not_told(mode: str) -> None:
    """The bad token is excluded, so there is a choice, and no softmax of the raw logits."""
    found = table().clone()
    found[..., BAD] = torch.nan
    plain, logprobs = bystanders(mode)[0], replace(bystanders(mode)[1], logprobs=1)
    without, one = serve(TabularModel(found), [plain, logprobs])
    assert without == unharmed()[0]
    assert one.failure == "computing the prompt failed: ValueError: the log-probabilities are no numbers"


def ill_at(token: int) -> Callable[[list[int]], Exception | None]:
    return lambda tokens: RuntimeError("a kernel of the forward failed") if token in tokens else None


@pytest.mark.parametrize("mode", MODES)
def test_a_forward_that_raises_fails_the_sequence_to_blame_and_nobody_beside_it(mode: str) -> None:
    one, *others = serve(Delicate(table(), ill_at(BAD)), [victim(mode), *bystanders(mode)])
    assert one.failure == "verifying failed: RuntimeError: a kernel of the forward failed"
    assert one.tokens == last_words().tokens[: len(one.tokens)]
    assert others == unharmed()


def test_a_forward_that_raises_once_for_all_costs_no_request() -> None:
    """As where memory was short for the whole batch."""
    pending = [MemoryError("short")]
    ails = Mock(side_effect=lambda tokens: pending.pop() if len(tokens) > ENGINE.prefill_chunk and pending else None)
    assert serve(Delicate(table(), ails), bystanders("ssd")) == unharmed()
    assert not pending


@pytest.mark.parametrize("mode", MODES)
def test_a_forward_without_device_memory_fails_its_sequences_with_what_to_change(mode: str) -> None:
    def ails(tokens: list[int]) -> Exception | None:
        return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.") if BAD in tokens else None

    asked = request((1, BAD, 2), mode, request_id="prompt")
    one, other, *others = serve(Delicate(table(), ails), [asked, victim(mode), *bystanders(mode)])
    remedy = "failed: out of device memory; lower engine.kv_memory or engine.prefill_chunk"
    assert (one.failure, other.failure) == (f"computing the prompt {remedy}", f"verifying {remedy}")
    assert other.tokens == last_words().tokens[: len(other.tokens)]
    assert others == unharmed()


@pytest.mark.parametrize("mode", MODES)
def test_a_prompt_whose_forward_raises_fails_alone(mode: str) -> None:
    asked = request((1, BAD, 2), mode, request_id="victim")
    one, *others = serve(Delicate(table(), ill_at(BAD)), [asked, *bystanders(mode)])
    assert one.failure == "computing the prompt failed: RuntimeError: a kernel of the forward failed"
    assert others == unharmed()


def test_a_prompt_that_failed_half_way_is_shared_with_nobody() -> None:
    """The second one with the same prompt computes all of it."""
    prompt, pending = tuple(range(1, 7)) * 3, [RuntimeError("once")]
    ails = Mock(side_effect=lambda tokens: pending.pop() if 1 < len(tokens) < 8 and pending else None)
    asked = [request(prompt, "ar", max_tokens=9, request_id=str(index)) for index in range(3)]
    first, *others = serve(Delicate(table(), ails), asked)
    assert first.failure is not None
    assert others == serve(TabularModel(table()), asked[1:])


@pytest.mark.parametrize("mode", MODES)
def test_a_pool_that_runs_out_fails_whom_it_does_not_hold(mode: str) -> None:
    def take_most(process: InProcess) -> None:
        allocator = process.engine.allocator
        taken = [allocator.allocate() for _ in range(allocator.num_blocks - 14)]
        finish = process.engine.scheduler.remove

        def give_back_at_the_end(sequence) -> None:
            finish(sequence)
            if not process.engine.has_work:
                for block in taken:
                    allocator.release(block)

        process.engine.scheduler.remove = give_back_at_the_end  # type: ignore[method-assign]

    ended = serve(TabularModel(table()), bystanders(mode), before=take_most)
    failed = [one for one in ended if one.failure]
    assert 0 < len(failed) < len(ended)
    assert all(OutOfBlocks.__name__ in str(one.failure) for one in failed)
    for one, expected in zip(ended, unharmed(), strict=True):
        assert one.tokens == expected.tokens[: len(one.tokens)]
        assert one.failure or one == expected


def test_a_lost_rank_of_the_target_still_ends_the_engine() -> None:
    with pytest.raises(PeerLost):
        serve(Delicate(table(), lambda tokens: PeerLost("target", 1, 3, "gone")), bystanders("ar"))


@pytest.mark.parametrize("method", ["admit", "propose", "observe"])
def test_a_speculator_that_raises_fails_its_own_mode(method: str) -> None:
    def break_it(process: InProcess) -> None:
        setattr(process.link, method, Mock(side_effect=ZeroDivisionError("float division by zero")))

    *others, one = serve(TabularModel(table()), [*bystanders("ar"), victim("ssd")], before=break_it)
    assert one.failure is not None
    assert "ZeroDivisionError" in one.failure
    assert others == unharmed()


def test_a_speculator_that_cannot_be_told_of_an_end_ends_nothing() -> None:
    def break_it(process: InProcess) -> None:
        finish = process.link.finish

        def told(sequence) -> None:
            finish(sequence)
            raise KeyError(sequence.sequence_id)

        process.link.finish = told  # type: ignore[method-assign]

    assert serve(TabularModel(table()), bystanders("ssd"), before=break_it) == unharmed()


@pytest.mark.parametrize("method", ["admit", "advance", "grow", "tree", "finish"])
def test_a_draft_in_the_targets_process_that_raises_costs_no_token(method: str) -> None:
    def break_it(process: InProcess) -> None:
        works, calls = getattr(process.colocated, method), iter(range(10**6))

        def now_and_then(*arguments: object) -> object:
            if next(calls) == 1:
                raise IndexError("list index out of range")
            return works(*arguments)

        setattr(process.colocated, method, now_and_then)

    assert serve(TabularModel(table()), bystanders("sd-colocated"), before=break_it) == unharmed()


@pytest.mark.parametrize("policy", ["uniform", "geometric", "confidence"])
@pytest.mark.parametrize("coupling", ["shared-noise", "rejection"])
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_a_draft_whose_logits_are_no_numbers_guesses_on(policy: str, coupling: str, value: float) -> None:
    blind = table(1).clone()
    blind[:, ::2] = value
    hot = [request(prompt, "ssd", max_tokens=20, params=SamplingParams(temperature=1.0)) for prompt in PROMPTS]
    cold = [request(prompt, mode, max_tokens=20) for prompt, mode in zip(PROMPTS, MODES[1:], strict=True)]
    shape = {"fan_out": policy, "coupling": coupling}
    for asked in (hot, cold):
        found = serve(TabularModel(table()), asked, TabularModel(blind), **shape)
        assert [one.reason for one in found] == ["length"] * 3
        if asked is cold or coupling == "shared-noise":
            plain = [request(one.prompt_tokens, "ar", max_tokens=20, params=one.params) for one in asked]
            assert [one.tokens for one in found] == [one.tokens for one in serve(TabularModel(table()), plain)]


def test_the_engine_goes_on_with_new_requests_after_a_failure() -> None:
    process = in_process(TabularModel(spoilt()), TabularModel(table()), ENGINE)  # type: ignore[arg-type]
    for mode in MODES:
        (failed,) = process.run([victim(mode)])
        assert failed.failure is not None
        assert [tuple(one.tokens[one.num_prompt :]) for one in process.run(bystanders(mode))] == [
            one.tokens for one in unharmed()
        ]
    process.assert_all_blocks_are_back()
