"""The benchmark: the same prompts and seeds in every mode, in turns, prompt by prompt or batch by batch in one engine.

Owns the measuring. Knows nothing of ranks or terminals.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from launcher.bench.plan import Run
from launcher.bench.prompts import Prompt
from launcher.generation import Generates, Generation, generate_together
from ssd_runtime.comm.control.client_messages import ChatMessage, Generate
from ssd_runtime.config import Config, Mode
from ssd_runtime.host.allotment import gpus_of
from ssd_runtime.host.cores import Role
from ssd_runtime.speculation.types import SamplingParams

WARM_UP_TOKENS = 16


@dataclass(frozen=True)
class Workload:
    """What every run is given.

    Attributes:
        prompts: in this order; prompt i is generated with seed `params.seed` + i.
        params: how tokens are chosen.
        max_tokens: of each prompt.
        repeat: how often all of it is measured.
        devices: how many cores (or GPUs) each mode uses, for the speed per device.
        ignore_eos: whether every output is `max_tokens` long.
    """

    prompts: tuple[Prompt, ...]
    params: SamplingParams
    max_tokens: int
    repeat: int = 1
    devices: Mapping[Mode, int] = field(default_factory=dict)
    ignore_eos: bool = False


@dataclass(frozen=True)
class Batch:
    """Requests that ran at once, in one repetition of the benchmark."""

    repeat: int
    generations: Sequence[Generation]

    @property
    def decoded(self) -> int:
        """Tokens after the first of each request."""
        return sum(max(one.finished.usage.completion_tokens - 1, 0) for one in self.generations)

    @property
    def decode_seconds(self) -> float:
        """From the first token to the last of one request; of several, from their arrival to the last token of all,
        less the prefills, which the engine computes between the rounds of the others."""
        statistics = [one.finished.statistics for one in self.generations]
        if len(statistics) == 1:
            return statistics[0].decode_seconds
        end = max(one.ttft_seconds + one.decode_seconds for one in statistics)
        return max(end - sum(one.prefill_seconds for one in statistics), 0.0)


@dataclass(frozen=True)
class Measured:
    """What a run was measured at, on so many cores (or GPUs)."""

    run: Run
    batches: Sequence[Batch]
    devices: int


def measure(
    client: Generates, runs: Sequence[Run], workload: Workload, advance: Callable[[str], None]
) -> list[Measured]:
    """Run the workload in every mode.

    Args:
        client: of one engine; modes and lookaheads are fields of each request.
        runs: which take turns at each prompt (those of one batch size at each batch); who goes first rotates.
        workload: the same for all.
        advance: called after each batch with the name of its run; `count_steps` times.
    """
    for run in runs:
        warm_up = [_request(run, workload, index) for index in range(min(run.batch, len(workload.prompts)))]
        generate_together(client, [replace(request, max_tokens=WARM_UP_TOKENS) for request in warm_up])
        advance(run.name)
    results: dict[str, list[Batch]] = {run.name: [] for run in runs}
    turn = 0
    for repeat in range(workload.repeat):
        for batch in sorted({run.batch for run in runs}):
            together = [run for run in runs if run.batch == batch]
            for start in range(0, len(workload.prompts), batch):
                first = turn % len(together)
                turn += 1
                places = range(len(workload.prompts))[start : start + batch]
                for run in (*together[first:], *together[:first]):
                    requests = [_request(run, workload, index) for index in places]
                    results[run.name].append(Batch(repeat, generate_together(client, requests)))
                    advance(run.name)
    return [Measured(run, results[run.name], workload.devices.get(run.mode, 1)) for run in runs]


def count_steps(runs: Sequence[Run], workload: Workload) -> int:
    """How often `measure` calls `advance`."""
    return sum(1 + workload.repeat * -(-len(workload.prompts) // run.batch) for run in runs)


def _request(run: Run, workload: Workload, index: int) -> Generate:
    return Generate(
        stream=False,
        samples=True,
        request_id=uuid.uuid4().hex,
        messages=(ChatMessage("user", workload.prompts[index].prompt),),
        params=replace(workload.params, seed=workload.params.seed + index),
        max_tokens=workload.max_tokens,
        mode=run.mode,
        lookahead=run.lookahead,
        ignore_eos=workload.ignore_eos,
    )


def devices_by_mode(config: Config, cores: Mapping[str, Sequence[int]]) -> dict[Mode, int]:
    """How many cores, or GPUs where a role runs on them, the ranks that a mode uses have.

    Args:
        cores: of each rank of the leader's host, in the order of the ranks; drafts that are elsewhere count as one.
    """
    roles: list[Role] = ["target" if name.split()[0] == "target" else "draft" for name in cores]
    used: dict[Role, set[tuple[str, int]]] = {"target": set(), "draft": set()}
    for role, gpu, numbers in zip(roles, gpus_of(config, roles), cores.values(), strict=True):
        used[role] |= {("core", core) for core in numbers} if gpu is None else {("gpu", gpu)}
    target = max(1, len(used["target"]))
    both = max(1, len(used["target"] | used["draft"])) if "draft" in roles else target + 1
    return {"ar": target, "sd-colocated": target, "sd": both, "ssd": both}
