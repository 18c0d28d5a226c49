"""`ssd slurm`: batch scripts for a configuration."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import click

from launcher.commands.options import MOST_NODES
from launcher.files import writing
from ssd_runtime.config import load_config
from ssd_runtime.errors import ConfigError


@click.group()
def slurm() -> None:
    """Run on a cluster that Slurm schedules."""


@slurm.command()
@click.option("--config", "config_path", type=click.Path(path_type=Path), help="TOML file on storage all nodes see.")
@click.option("--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Override one configuration key.")
@click.option(
    "--two-jobs/--single-job", "two_jobs", default=True, help="Target and draft apart (default), or together."
)
@click.option(
    "--nodes", type=click.IntRange(1, MOST_NODES), default=1, show_default=True, help="Of the job with the target."
)
@click.option(
    "--nproc-per-node", metavar="N[,N...]", help="Ranks on each of them; default: the target's together, in front."
)
@click.option("--name", default="ssd", show_default=True, help="Of the jobs and files.")
@click.option("--time", default="24:00:00", show_default=True, help="Limit of each job.")
@click.option(
    "--sbatch", multiple=True, metavar="OPTION", help="One more option of every job: --sbatch=--partition=gpu"
)
@click.option("--python", default=sys.executable, help="Interpreter on the nodes; default: this one.")
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), default=Path(), help="Directory; default: here."
)
def render(
    config_path: Path | None,
    overrides: tuple[str, ...],
    two_jobs: bool,
    nodes: int,
    nproc_per_node: str | None,
    name: str,
    time: str,
    sbatch: tuple[str, ...],
    python: str,
    out: Path,
) -> None:
    """Write the batch scripts of a configuration."""
    from launcher import slurm as scripts

    config = load_config(config_path, overrides)
    if config_path is not None and not config_path.is_file():
        raise ConfigError(
            f"--config {config_path}: the nodes read it when the job runs; give a file that all of them see"
        )
    plan = scripts.Plan(
        config=config,
        config_path=None if config_path is None else config_path.resolve(),
        overrides=overrides,
        form="two-jobs" if two_jobs else "single-job",
        nodes=nodes,
        nproc_per_node=nproc_per_node,
        name=name,
        time=time,
        sbatch=sbatch,
        python=python,
        written_by=shlex.join(["ssd", *click.get_current_context().obj]),
    )
    texts = scripts.render(plan)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write to {out}: {error.strerror}") from None
    for file, text in texts.items():
        with writing(out / file):
            (out / file).write_text(text, encoding="utf-8")
            (out / file).chmod(0o755)
        click.echo(f"wrote {out / file}")
    if (waste := scripts.wasted(plan)) is not None:
        click.echo(f"note: {waste}")
    submit = f"{out / plan.files[-1]}"
    click.echo(f"submit: {'bash' if two_jobs else 'sbatch'} {shlex.quote(submit)}")
