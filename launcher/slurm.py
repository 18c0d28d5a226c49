"""Batch scripts for Slurm: one job with everything in it, or two, target and draft, that fail apart.

Writes text; submits nothing. The templates are in launcher/templates. What goes into a command is quoted (`_shared`);
what goes where nothing can be quoted, into comments and Slurm's own lines, is refused unless it is plain (`_check`).
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jinja2

from launcher.nodes import seats_of
from ssd_runtime.config import Config
from ssd_runtime.errors import ConfigError
from ssd_runtime.host.allotment import gpus_of, model_of
from ssd_runtime.host.cores import Role

Form = Literal["two-jobs", "single-job"]
PURPOSES: dict[Role | None, str] = {
    None: "One job: target and draft live and die together.",
    "target": "The target's job. It serves with or without a draft.",
    "draft": "A draft's job. It may be cancelled, requeued and submitted again while the target serves.",
}
CORES_BESIDE_A_GPU = 4  # the rank's own thread, those of the link, ZeroMQ's, torchrun's


@dataclass(frozen=True)
class Plan:
    """What to write.

    Attributes:
        config: of the run.
        config_path: where the ranks read it: a path that all nodes see; None for the defaults.
        overrides: `section.key=value`.
        form: two jobs, or one.
        nodes: of the job with the target.
        nproc_per_node: ranks on each of these nodes, N or N,N,...; None leaves it to `nodes.spread`.
        name: of the jobs, and of the files.
        time: limit of each job, as Slurm writes it.
        sbatch: further options of every job.
        python: the interpreter on the nodes.
        written_by: the command, for whoever finds the file.
    """

    config: Config
    config_path: Path | None = None
    overrides: tuple[str, ...] = ()
    form: Form = "two-jobs"
    nodes: int = 1
    nproc_per_node: str | None = None
    name: str = "ssd"
    time: str = "24:00:00"
    sbatch: tuple[str, ...] = ()
    python: str = field(default_factory=lambda: sys.executable)
    written_by: str = "ssd slurm render"

    @property
    def files(self) -> tuple[str, ...]:
        """The names of what `render` gives."""
        if self.form == "single-job":
            return (f"{self.name}.sbatch",)
        return (f"{self.name}-target.sbatch", f"{self.name}-draft.sbatch", f"{self.name}-submit.sh")


def render(plan: Plan) -> dict[str, str]:
    """File name -> text. Raises ConfigError for a plan that cannot be."""
    _check(plan)
    mode = plan.config.speculation.mode
    if plan.form == "single-job":
        return {plan.files[0]: _job(plan, None)}
    if mode in ("ar", "sd-colocated"):
        raise ConfigError(f"speculation.mode = {mode} uses no draft of its own: render it with --single-job")
    if plan.config.deployment.share_gpu:
        raise ConfigError("deployment.share_gpu: Slurm gives two jobs no GPU in common: render it with --single-job")
    submit = _template("submit.sh.j2", _shared(plan) | {"drafts": plan.config.deployment.drafts})
    return dict(zip(plan.files, (_job(plan, "target"), _job(plan, "draft"), submit), strict=True))


def _check(plan: Plan) -> None:
    """Raise ConfigError for what would not stand in a script as it was meant."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", plan.name):
        raise ConfigError(f"--name {plan.name!r}: a job's name has letters, digits, dots, dashes and underscores here")
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}|UNLIMITED|INFINITE", plan.time, re.ASCII | re.IGNORECASE):
        raise ConfigError(f"--time {plan.time!r}: expected minutes, HOURS:MINUTES:SECONDS or DAYS-HOURS")
    for option in plan.sbatch:
        try:
            plain = option.isprintable() and shlex.split(option, comments=True) == shlex.split(option)
        except ValueError:  # a quotation without its end
            plain = False
        if not option.startswith("-") or not plain:
            remedy = "expected an option in one line, as in --partition=gpu, with quotes around spaces and #"
            raise ConfigError(f"--sbatch {option!r}: {remedy}")


def _in_one_line(command: str) -> str:
    """For a comment: nothing in it ends the line."""
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in command)


def wasted(plan: Plan) -> str | None:
    """What a single job asks for and does not use, for people: Slurm gives every node of a job the same."""
    nodes = _nodes(plan, None if plan.form == "single-job" else "target")
    gpus = [_gpus(plan.config, roles) for roles in nodes]
    if len(set(gpus)) == 1:
        return None
    idle = sum(max(gpus) - count for count in gpus)
    return (
        f"the nodes of a job are alike, so each is asked for {max(gpus)} GPUs though their ranks use "
        f"{' and '.join(map(str, gpus))}: {idle} stay idle"
        + ("; --two-jobs asks for what each role needs" if plan.form == "single-job" else "")
    )


def _nodes(plan: Plan, role: Role | None) -> list[list[Role]]:
    """The roles of the ranks on each node of the job with the target, or of a draft's job."""
    count, counts = (1, None) if role == "draft" else (plan.nodes, plan.nproc_per_node)
    seats = seats_of(plan.config, count, counts, role)
    return [[seat.role for seat in seats if seat.node == node] for node in range(count)]


def _gpus(config: Config, roles: list[Role]) -> int:
    """How many GPUs these ranks of one node use."""
    return len({gpu for gpu in gpus_of(config, roles) if gpu is not None})


def _cores(config: Config, roles: list[Role]) -> int:
    """How many cores these ranks of one node are asked for."""
    models = [model_of(config, role) for role in roles]
    return max(2, sum(CORES_BESIDE_A_GPU if model.device == "cuda" else model.threads for model in models))


def _job(plan: Plan, role: Role | None) -> str:
    """The script of the job of a role, or of both in one world."""
    is_draft = role == "draft"
    nodes = _nodes(plan, role)
    job = {
        "purpose": PURPOSES[role],
        "name": plan.name if role is None else f"{plan.name}-{role}",
        "nodes": len(nodes),
        "requeue": is_draft,
        "most_failures": 10 if is_draft else 3,
        "serve_port": plan.config.serve.port,
        "arguments": _arguments(plan.config, role),
    }
    return _template(
        "draft.sbatch.j2" if is_draft else "job.sbatch.j2", _shared(plan) | _resources(plan.config, nodes) | job
    )


def _arguments(config: Config, role: Role | None) -> str:
    """Those of the ranks that the script itself has to find out."""
    if role == "draft":
        return '--role draft --target "$target_node:$target_port"'
    only = "" if role is None else f"--role {role} "
    return f'{only}--set serve.host="$head_address" --set serve.port={config.serve.port or "$port"}'


def _shared(plan: Plan) -> dict[str, Any]:
    worker = [] if plan.config_path is None else ["--config", str(plan.config_path)]
    worker += [part for override in plan.overrides for part in ("--set", override)]
    return {
        "written_by": _in_one_line(plan.written_by),
        "name": plan.name,
        "time": plan.time,
        "sbatch": plan.sbatch,
        "python": shlex.quote(plan.python),
        "worker": shlex.join(worker),
        "join_timeout": round(plan.config.timeouts.load),
    }


def _resources(config: Config, nodes: list[list[Role]]) -> dict[str, Any]:
    """What each node of the job is asked for: of each kind, what the one needs that needs most."""
    counts = [len(roles) for roles in nodes]
    alike = len(set(counts)) == 1
    return {
        "ranks_per_node": str(counts[0]) if alike else '"${ranks[SLURM_NODEID]}"',
        "ranks_of_nodes": None if alike else " ".join(map(str, counts)),
        "gpus": max(_gpus(config, roles) for roles in nodes),
        "cpus": max(_cores(config, roles) for roles in nodes),
    }


def _template(name: str, values: Mapping[str, Any]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("launcher", "templates"),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    return environment.get_template(name).render(values)
