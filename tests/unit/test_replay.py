"""The followers of a tensor-parallel target: batches arrive as they were sent, and nobody waits for ever."""

from __future__ import annotations

import contextlib
import threading
import time
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from cuda_ext.ops import Span
from ssd_runtime.comm.collective import TargetGroup, meet_target_ranks
from ssd_runtime.errors import PeerLost
from ssd_runtime.leader.forward_codec import decode_batch, encode_batch
from ssd_runtime.leader.replay import FRAME_WORDS, Follower, LeadingDecoder
from ssd_runtime.model.batch import ForwardBatch
from ssd_runtime.model.load import decoder_from_weights
from tests.target_ranks import SOON, on_every_rank, parallel_decoder
from tests.tiny_models import CPU, PagedRun, RandomWeights, tiny_architecture, tiny_decoder

SOURCE = RandomWeights(tiny_architecture(), seed=1)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_batch_arrives_as_it_was_sent(data: st.DataObject) -> None:
    draw = data.draw
    num_rows, num_sequences = draw(st.integers(1, 9)), draw(st.integers(1, 4))
    block_size, reach, depth = draw(st.integers(1, 16)), draw(st.integers(1, 50)), draw(st.integers(0, 4))
    seed = draw(st.integers(0, 99))
    generator = torch.Generator().manual_seed(seed)

    def integers(*shape: int, most: int = 1 << 40) -> torch.Tensor:
        return torch.randint(-1, most, shape, generator=generator)

    blocks = integers(num_sequences, -(-reach // block_size), most=1000).clamp_min(0)
    tables = (blocks[:, :, None] * block_size + torch.arange(block_size)).flatten(1)[:, :reach]
    wanted = None if draw(st.booleans()) else integers(draw(st.integers(0, num_rows)))
    rows = [integers(num_rows) for _ in range(5)]
    spans = tuple(Span(draw(st.integers(0, 9)), draw(st.integers(0, reach))) for _ in range(num_sequences))
    batch = ForwardBatch(*rows[:4], tables, rows[4], integers(num_rows, depth), spans, wanted)
    arrived = decode_batch(encode_batch(batch, block_size), block_size, CPU)
    for name, sent in vars(batch).items():
        got = getattr(arrived, name)
        assert torch.equal(got, sent) if isinstance(sent, torch.Tensor) else got == sent, name


def test_words_that_are_no_batch_lose_the_leader() -> None:
    words = encode_batch(
        ForwardBatch(*torch.zeros(4, 3, dtype=torch.int64), torch.zeros(1, 8, dtype=torch.int64),
                     torch.ones(3, dtype=torch.int64), torch.zeros(3, 0, dtype=torch.int64),
                     (Span(3, 1),)), 4
    )  # fmt: skip
    with pytest.raises(PeerLost, match="does not hold a batch"):
        decode_batch(words[:-1], 4, CPU)


def test_a_forward_that_does_not_fit_into_one_frame() -> None:
    tokens = torch.randint(0, 96, (600,), generator=torch.Generator().manual_seed(2)).tolist()
    assert 5 * len(tokens) > FRAME_WORDS
    expected = PagedRun(tiny_decoder(seed=1), num_slots=640, seed=0)
    with parallel_decoder(SOURCE, 2, block_size=1) as decoder:
        run = PagedRun(decoder, num_slots=640)  # type: ignore[arg-type]
        torch.testing.assert_close(run.trunk(tokens), expected.trunk(tokens), atol=1e-4, rtol=0)
        torch.testing.assert_close(run.trunk([5], 600), expected.trunk([5], 600), atol=1e-4, rtol=0)


def test_sums_are_added_in_the_order_of_ranks_and_rounded_once() -> None:
    def total(group: TargetGroup) -> torch.Tensor:
        return group.sum(torch.tensor([1.0, 2.0**-8, 2.0**-9], dtype=torch.bfloat16)[group.rank].expand(5, 3))

    for found in on_every_rank(3, total):
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, torch.full((5, 3), 1 + 2.0**-8 + 2.0**-9).to(torch.bfloat16))


class Pair:
    """A leader and a follower in a thread, with short deadlines."""

    def __init__(self, silence: float, heartbeat: float) -> None:
        store = dist.HashStore()
        met: list[TargetGroup] = []
        thread = threading.Thread(target=lambda: met.append(meet_target_ranks(store, 1, 2, "127.0.0.1", SOON)))
        thread.start()
        self.ours = meet_target_ranks(store, 0, 2, "127.0.0.1", SOON)
        thread.join(SOON)
        (self.theirs,) = met

        def load(group: TargetGroup) -> None:
            self.decoders[group.rank] = decoder_from_weights(SOURCE, "fp32", CPU, group=group)

        self.decoders: dict[int, object] = {}
        loading = threading.Thread(target=load, args=(self.theirs,))
        loading.start()
        load(self.ours)
        loading.join(SOON)
        self.ours.deadline_s = self.theirs.deadline_s = silence
        self.leader = LeadingDecoder(self.decoders[0], self.ours, 1, heartbeat)  # type: ignore[arg-type]
        self.follower = Follower(self.decoders[1], self.theirs, 1)  # type: ignore[arg-type]
        self.ended: list[BaseException | None] = []
        self.thread = threading.Thread(target=self._follow, daemon=True)

    def _follow(self) -> None:
        try:
            self.follower.run()
            self.ended.append(None)
        except PeerLost as lost:
            self.ended.append(lost)

    def forward(self) -> torch.Tensor:
        return PagedRun(self.leader, num_slots=64).trunk([1, 2, 3])  # type: ignore[arg-type]


def test_an_idle_leader_keeps_its_followers() -> None:
    pair = Pair(silence=2.0, heartbeat=0.2)
    pair.thread.start()
    pair.leader.start()
    pair.forward()
    pair.thread.join(3.0)  # longer than the follower would wait for a leader that says nothing
    assert pair.thread.is_alive()
    pair.leader.check()
    pair.forward()
    pair.leader.close()
    pair.thread.join(SOON)
    assert pair.ended == [None]


def test_a_leader_that_is_gone_ends_its_followers() -> None:
    pair = Pair(silence=SOON, heartbeat=SOON)
    pair.thread.start()
    pair.forward()
    pair.ours.close()
    pair.leader = pair.decoders[0] = pair.ours = None  # type: ignore[assignment]
    pair.thread.join(5.0)
    (lost,) = pair.ended
    assert isinstance(lost, PeerLost)
    assert (lost.role, lost.rank) == ("target", 0)


def test_a_leader_that_says_nothing_ends_its_followers_in_time() -> None:
    pair = Pair(silence=0.5, heartbeat=SOON)
    start = time.monotonic()
    pair.thread.start()
    pair.thread.join(10.0)
    assert isinstance(pair.ended[0], PeerLost)
    assert time.monotonic() - start >= 0.5


def test_a_follower_that_is_silent_fails_the_forward_in_time_and_for_good() -> None:
    pair = Pair(silence=0.5, heartbeat=SOON)
    start = time.monotonic()
    with pytest.raises(PeerLost, match="target rank 1 lost"):
        pair.forward()
    assert time.monotonic() - start < 10
    with pytest.raises(PeerLost, match="target rank 1 lost"):
        pair.forward()
    pair.leader.close()


def test_a_forward_that_fails_in_the_middle_ends_the_target() -> None:
    """The followers are in the same forward: whatever the leader said next, they would not understand it."""
    pair = Pair(silence=0.5, heartbeat=SOON)
    pair.thread.start()
    pair.forward()
    pair.decoders[0].settle = Mock(side_effect=MemoryError("short"))  # type: ignore[attr-defined]
    with pytest.raises(PeerLost, match="its part of a forward failed: MemoryError: short"):
        pair.forward()
    with pytest.raises(PeerLost, match="its part of a forward failed"):
        pair.leader.check()
    pair.leader.close()
    pair.thread.join(SOON)
    assert isinstance(pair.ended[0], PeerLost)


def test_a_follower_that_goes_while_nothing_is_computed_is_missed() -> None:
    pair = Pair(silence=1.0, heartbeat=0.1)
    pair.leader.start()
    with contextlib.suppress(PeerLost):
        for _ in range(200):
            pair.leader.check()
            time.sleep(0.05)
    with pytest.raises(PeerLost, match="target rank 1"):
        pair.leader.check()
    pair.leader.close()


def test_ranks_that_do_not_come_are_named_in_time() -> None:
    with pytest.raises(PeerLost, match=r"2 target ranks did not meet within 0\.3 s"):
        meet_target_ranks(dist.HashStore(), 0, 2, "127.0.0.1", 0.3)
