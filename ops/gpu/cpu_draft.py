"""SmolLM2 in bfloat16 on the GPU, its int8 draft on CPU cores of the same host."""

from __future__ import annotations

from collections.abc import Iterator

from ops.gpu.bench import bench
from ops.gpu.result import Finding, Setting, run_step


def find(setting: Setting) -> Iterator[Finding]:
    models = (f"target.model={setting.model}", f"draft.model={setting.model}")
    options = ("--modes", "ar,sd,ssd", "--limit", "3", "--max-tokens", "96")
    yield from bench(setting, "gpu_target_cpu_draft.toml", options, models)


if __name__ == "__main__":
    raise SystemExit(run_step(__file__, __doc__, find))
