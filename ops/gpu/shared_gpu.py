"""Both roles on one GPU, in two processes."""

from __future__ import annotations

from collections.abc import Iterator

from ops.gpu.bench import bench
from ops.gpu.result import Finding, Setting, run_step

LABEL = "Two roles on one GPU share its bandwidth: what SSD gains here is a lower bound of what two GPUs give."


def find(setting: Setting) -> Iterator[Finding]:
    models = (f"target.model={setting.model}", f"draft.model={setting.model}")
    options = ("--modes", "ar,sd,ssd", "--batch", "1,4", "--limit", "4", "--max-tokens", "64")
    yield from bench(setting, "one_gpu_llama31_8b_1b.toml", options, models)


if __name__ == "__main__":
    raise SystemExit(run_step(__file__, __doc__, find, (LABEL,)))
