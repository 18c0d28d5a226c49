"""A target of two ranks on one GPU over NCCL against a target of one rank: are the tokens the same?"""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from launcher.ranks import nccl
from ops.gpu.nccl_follower import BLOCK, DEADLINE_S, follow, groups
from ops.gpu.result import Finding, Number, Setting, judged, run_step
from ops.gpu.timing import device_of
from ssd_runtime.config import Dtype, EngineConfig, Mode, SpeculationConfig
from ssd_runtime.leader.replay import LeadingDecoder
from ssd_runtime.model.architecture import Architecture
from ssd_runtime.model.batch import Model
from ssd_runtime.model.load import decoder_from_weights
from ssd_runtime.speculation.types import SamplingParams
from tests.engines import in_process, random_steps, request
from tests.tiny_models import RandomWeights, tiny_architecture

LABEL = "Weights are random. In bfloat16 two ranks round otherwise than one: how many outputs differ is a measurement."
SIZES = {
    "num_layers": 4,
    "num_heads": 8,
    "num_kv_heads": 2,
    "head_dim": 64,
    "hidden_size": 512,
    "intermediate_size": 1024,
}
HEARTBEAT_S = 2.0
SPECULATION = SpeculationConfig(lookahead=4, budget=8)
MODES: tuple[Mode, ...] = ("ar", "ssd")
Outputs = list[tuple[int, ...]]


@contextlib.contextmanager
def shared_target(arch: Architecture, dtype: Dtype, device: torch.device) -> Iterator[Model]:
    """The leader of two ranks."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    follower = context.Process(target=follow, args=(server.port, arch, dtype, device), daemon=True)
    follower.start()
    try:
        with groups(server.port, 0, device) as (frames, tensors):
            part = decoder_from_weights(RandomWeights(arch), dtype, device, group=tensors)
            with contextlib.closing(LeadingDecoder(part, frames, BLOCK, HEARTBEAT_S)) as leader:
                leader.start()
                yield leader
    finally:
        follower.join(DEADLINE_S)
        follower.kill()


def outputs(target: Model, draft: Any, mode: Mode, num_tokens: int) -> Outputs:
    """Of a few prompts at once, greedy and sampled."""
    engine = EngineConfig(max_model_len=512, max_num_seqs=4, block_size=BLOCK, prefill_chunk=32)
    process = in_process(target, draft, engine, SPECULATION, random_steps(3))  # type: ignore[arg-type]
    asked = [
        request(
            tuple(range(2 + index, 40 + 5 * index)),
            mode,
            lookahead=0 if mode == "ar" else SPECULATION.lookahead,
            max_tokens=num_tokens,
            params=SamplingParams(temperature=0.7 * (index % 2), seed=index),
            request_id=f"{mode}-{index}",
        )
        for index in range(4)
    ]
    return [tuple(sequence.tokens[sequence.num_prompt :]) for sequence in process.run(asked)]


def find(setting: Setting) -> Iterator[Finding]:
    device, num_tokens = device_of(setting), 16 if setting.small else 64
    nccl.apply()
    arch = tiny_architecture(**({} if setting.small else SIZES))
    dtypes: tuple[Dtype, ...] = ("fp32",) if setting.small else ("fp32", "bf16")
    for dtype in dtypes:
        alone = decoder_from_weights(RandomWeights(arch), dtype, device)
        expected = outputs(alone, alone, "ar", num_tokens)
        with shared_target(arch, dtype, device) as leader:
            for mode in MODES:
                start = time.monotonic()
                found = outputs(leader, alone, mode, num_tokens)
                differing = sum(one != other for one, other in zip(expected, found, strict=True))
                numbers = Number("outputs", len(found)), Number("differing", differing)
                seconds = Number("seconds", time.monotonic() - start, "s")
                yield judged(f"{dtype}, {mode}", dtype == "bf16" or not differing, *numbers, seconds)


if __name__ == "__main__":
    raise SystemExit(run_step(__file__, __doc__, find, (LABEL,)))
