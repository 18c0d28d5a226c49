"""Batch scripts as text: valid bash, what they ask Slurm for, and what they start."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.cli import main
from launcher.slurm import Plan, render, wasted
from ssd_runtime.config import load_config
from ssd_runtime.errors import ConfigError
from ssd_runtime.host.cores import BINDING

GPUS = ("target.device=cuda", "draft.device=cuda", "draft.dtype=bf16")


def plan(*overrides: str, **fields: object) -> Plan:
    return Plan(load_config(None, overrides), overrides=overrides, **fields)  # type: ignore[arg-type]


def options(script: str) -> dict[str, str]:
    """What the script asks Slurm for."""
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH --")]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"form": "single-job"},
        {"form": "single-job", "nodes": 2},
        {"form": "single-job", "nodes": 1, "nproc_per_node": "2"},
        {"sbatch": ("--partition=gpu",)},
    ],
)
@pytest.mark.parametrize("overrides", [(), GPUS, ("serve.port=8123",), ("target.model=/a path/with 'quotes'",)])
def test_every_script_is_valid_bash(overrides: tuple[str, ...], fields: dict, tmp_path: Path) -> None:
    scripts = render(plan(*overrides, **fields))
    for name, text in scripts.items():
        assert text.startswith("#!/bin/bash\n")
        assert text.endswith("\n")
        (tmp_path / name).write_text(text)
        checked = subprocess.run(["bash", "-n", str(tmp_path / name)], capture_output=True, text=True, timeout=20)
        assert (checked.returncode, checked.stderr) == (0, "")


def test_the_draft_may_be_requeued_and_the_target_is_not() -> None:
    target, draft, submit = render(plan()).values()
    assert ("requeue" in options(target), "requeue" in options(draft)) == (False, True)
    assert 'sbatch --parsable --dependency="after:$target" --export="ALL,SSD_TARGET_JOB=$target"' in submit
    for script in (target, draft):
        assert options(script)["output"] == "%x_%j.out"
        assert options(script)["signal"] == "B:USR1@60"
        assert options(script)["ntasks-per-node"] == "1"


def test_each_of_several_drafts_is_a_job_of_its_own() -> None:
    target, draft, submit = render(plan(*GPUS, "deployment.drafts=3")).values()
    assert (options(target)["gpus-per-node"], options(draft)["gpus-per-node"]) == ("1", "1")
    assert "--nproc-per-node 1 " in draft
    assert "drafts=3\n" in submit
    together = render(plan(*GPUS, "deployment.drafts=3", form="single-job"))["ssd.sbatch"]
    assert options(together)["gpus-per-node"] == "4"
    assert "--nproc-per-node 4 " in together


def test_gpus_and_cores_are_asked_for_by_the_ranks_of_a_node() -> None:
    target, draft, _ = render(plan(*GPUS)).values()
    assert (options(target)["gpus-per-node"], options(draft)["gpus-per-node"]) == ("1", "1")
    together = options(render(plan(*GPUS, form="single-job"))["ssd.sbatch"])
    assert (together["nodes"], together["gpus-per-node"], together["cpus-per-task"]) == ("1", "2", "8")
    apart = options(render(plan(*GPUS, form="single-job", nodes=2))["ssd.sbatch"])
    assert (apart["nodes"], apart["gpus-per-node"], apart["cpus-per-task"]) == ("2", "1", "4")
    assert "gpus-per-node" not in options(render(plan("target.threads=6"))["ssd-target.sbatch"])
    assert options(render(plan("target.threads=6"))["ssd-target.sbatch"])["cpus-per-task"] == "6"


MIXED = ("target.device=cuda", "draft.threads=6")


def test_only_ranks_on_gpus_are_given_gpus_and_each_its_cores() -> None:
    target, draft, _ = render(plan(*MIXED)).values()
    assert (options(target)["gpus-per-node"], options(target)["cpus-per-task"]) == ("1", "4")
    assert ("gpus-per-node" in options(draft), options(draft)["cpus-per-task"]) == (False, "6")
    together = options(render(plan(*MIXED, "deployment.drafts=2", form="single-job"))["ssd.sbatch"])
    assert (together["gpus-per-node"], together["cpus-per-task"]) == ("1", "16")
    on_cpu = options(render(plan("draft.device=cuda", "draft.dtype=bf16", form="single-job"))["ssd.sbatch"])
    assert (on_cpu["gpus-per-node"], on_cpu["cpus-per-task"]) == ("1", "5")
    assert "though their ranks use 1 and 0: 1 stay idle" in (wasted(plan(*MIXED, form="single-job", nodes=2)) or "")
    assert wasted(plan(*MIXED, "deployment.drafts=3", form="single-job")) is None


def test_a_gpu_that_both_roles_share_is_asked_for_once_and_by_one_job() -> None:
    shared = (*GPUS, "deployment.share_gpu=true", "deployment.drafts=2")
    together = options(render(plan(*shared, form="single-job"))["ssd.sbatch"])
    assert (together["gpus-per-node"], together["cpus-per-task"]) == ("1", "12")
    with pytest.raises(ConfigError, match=r"deployment\.share_gpu: .* --single-job"):
        render(plan(*shared))


def test_nodes_may_run_different_numbers_of_ranks(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    four = (*GPUS, "target.tensor_parallel=4")
    script = render(plan(*four, form="single-job", nodes=2))["ssd.sbatch"]
    assert "ranks=(4 1) # of each node\n" in script
    assert '--nproc-per-node "${ranks[SLURM_NODEID]}"' in script
    assert (options(script)["gpus-per-node"], options(script)["cpus-per-task"]) == ("4", "16")
    assert "ranks=" not in render(plan(*four, form="single-job", nodes=5))["ssd.sbatch"]
    told = render(plan(*four, form="single-job", nodes=2, nproc_per_node="2,3"))["ssd.sbatch"]
    assert "ranks=(2 3)" in told
    two_jobs = render(plan(*four, nodes=2, nproc_per_node="3,1"))
    assert "ranks=(3 1)" in two_jobs["ssd-target.sbatch"]
    assert "--nproc-per-node 1 " in two_jobs["ssd-draft.sbatch"]
    arguments = ["slurm", "render", "--single-job", "--nodes", "2", "--out", str(tmp_path)]
    assert main([*arguments, *(part for one in four for part in ("--set", one))]) == 0
    said = "each is asked for 4 GPUs though their ranks use 4 and 1: 3 stay idle; --two-jobs asks for what each role"
    assert said in capsys.readouterr().out


def test_what_a_node_runs_is_chosen_by_its_number(tmp_path: Path) -> None:
    """The array in the script is bash's to read: run the part that srun runs, with python played by echo."""
    script = render(plan("target.tensor_parallel=2", form="single-job", nodes=2))["ssd.sbatch"]
    body = script.partition("bash -c '")[2].partition("' \\\n")[0]
    for node, ranks in (("0", "2"), ("1", "1")):
        environment = {"SLURM_NNODES": "2", "SLURM_NODEID": node, "SLURM_JOB_ID": "7", "PATH": os.environ["PATH"]}
        command = ["bash", "-c", body, "head:1", "echo"]
        said = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=20, check=True).stdout
        assert f"--nnodes 2 --node-rank {node} --nproc-per-node {ranks} --max-restarts 0" in said


def test_the_submit_script_submits_every_draft_for_one_target(tmp_path: Path) -> None:
    """The submit script with an sbatch that counts."""
    (tmp_path / "sbatch").write_text(f'#!/bin/bash\necho "$@" >> {tmp_path}/asked\nwc -l < {tmp_path}/asked\n')
    (tmp_path / "sbatch").chmod(0o755)
    submit = tmp_path / "ssd-submit.sh"
    submit.write_text(render(plan("deployment.drafts=2"))["ssd-submit.sh"])
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def run(*arguments: str) -> str:
        command = ["bash", str(submit), *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=20, check=True).stdout

    assert run() == "target 1 draft 2 draft 3\n"
    assert run("1") == "target 1 draft 4\n"
    asked = (tmp_path / "asked").read_text().splitlines()
    assert ["--dependency=after:1" in line and "SSD_TARGET_JOB=1" in line for line in asked] == [
        False,
        True,
        True,
        True,
    ]


def test_a_fixed_port_is_what_the_draft_asks_for() -> None:
    assert "target_port=8123\n" in render(plan("serve.port=8123"))["ssd-draft.sbatch"]
    assert 'target_port=$(ports_of "$SSD_TARGET_JOB")' in render(plan())["ssd-draft.sbatch"]


def test_a_mode_without_a_draft_has_no_two_jobs() -> None:
    with pytest.raises(ConfigError, match="--single-job"):
        render(plan("speculation.mode=ar"))
    assert "--nproc-per-node 1" in render(plan("speculation.mode=ar", form="single-job"))["ssd.sbatch"]


def test_ranks_of_a_job_take_neither_modules_nor_cores_from_where_it_was_submitted() -> None:
    for script in render(plan()).values():
        if "launcher.worker" in script:
            assert f"\nunset {' '.join(BINDING)}" in script
            assert "\nexport OMP_NUM_THREADS=1 PYTHONSAFEPATH=1 " in script


def test_render_writes_scripts_that_say_how_they_were_made(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["slurm", "render", "--single-job", "--set", "speculation.lookahead=3", "--out", str(tmp_path)]
    assert main([*arguments, "--sbatch=--partition=gpu", "--time", "1:00:00", "--name", "mine"]) == 0
    assert f"submit: sbatch {tmp_path}/mine.sbatch" in capsys.readouterr().out
    script = (tmp_path / "mine.sbatch").read_text()
    assert "# Written by: ssd slurm render --single-job --set speculation.lookahead=3 --out " in script
    assert (options(script)["partition"], options(script)["time"]) == ("gpu", "1:00:00")
    assert 'exec "$1" -m launcher.agent' in script
    assert f"{sys.executable} -m launcher.worker --set speculation.lookahead=3" in script


STUBS = {
    "srun": 'while [ "$1" != bash ]; do shift; done; SLURM_NODEID=0 exec "$@"',
    "scontrol": "echo head",
    "getent": "echo 10.0.0.1 STREAM head",
}
RECORDER = '#!/bin/bash\nprintf \'%s\\0\' "$@" > "$SEEN"\n'
WORDS = st.sampled_from(
    ["opt", "my env", "$HOME", "`id`", "$(id)", ";id", "'", '"', "\\", "\n", "#", "{{ name }}", "*", "é", "-"]
)
TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=20)


@settings(max_examples=30)
@given(
    python=st.lists(WORDS, min_size=1).map("".join).filter(lambda name: len(name.encode()) < 200),
    texts=st.lists(TEXTS | st.lists(WORDS, min_size=1).map("".join), min_size=2, max_size=2),
    form=st.sampled_from(["two-jobs", "single-job"]),
)
def test_every_argument_arrives_as_it_was_given(tmp_path_factory, python: str, texts: list[str], form: str) -> None:
    """The script with a Slurm that runs the one task here, and an interpreter that writes down what it is given."""
    directory = tmp_path_factory.mktemp("job")
    for name, text in STUBS.items():
        (directory / name).write_text(f"#!/bin/bash\n{text}\n")
        (directory / name).chmod(0o755)
    interpreter = directory / python
    interpreter.write_text(RECORDER)
    interpreter.chmod(0o755)
    fields = {"config_path": Path("/") / texts[0], "python": str(interpreter), "written_by": f"ssd {texts[0]}"}
    scripts = render(replace(plan(form=form), overrides=(texts[1],), **fields))
    script = directory / "script"
    script.write_text(next(iter(scripts.values())), encoding="utf-8")
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True, timeout=20).stderr == b""
    variables = {
        "SLURM_JOB_NODELIST": "head",
        "SLURM_JOB_ID": "7",
        "SLURM_NNODES": "1",
        "SEEN": str(directory / "seen"),
    }
    environment = {**os.environ, **variables, "PATH": f"{directory}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", str(script)], cwd=directory, env=environment, capture_output=True, timeout=20)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    seen = (directory / "seen").read_bytes().decode().split("\0")[:-1]
    worker = seen[seen.index("launcher.worker") + 1 :]
    assert worker[:4] == ["--config", str(fields["config_path"]), "--set", texts[1]]
    assert seen[seen.index("--rdzv-endpoint") + 1] == "10.0.0.1:10015"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--name", "a b"], "--name 'a b'"),
        (["--name", "a\nb"], "--name 'a\\nb'"),
        (["--time", "1:00\nrm"], "--time '1:00\\nrm'"),
        (["--time", "soon"], "--time 'soon': expected minutes"),
        (["--sbatch", "--comment=a\nrm -rf x"], "--sbatch '--comment=a\\nrm -rf x': expected an option in one line"),
        (["--sbatch", "--comment='a"], "with quotes around spaces"),
        (["--sbatch", "--comment=a #b"], "with quotes around spaces and #"),
        (["--sbatch", "partition=gpu"], "expected an option"),
        (["--config", "/dev/null"], "give a file that all of them see"),
        (["--nodes", "1000000000"], "--nodes"),
        (["--out", "/dev/null/x"], "cannot write to /dev"),
        (["--single-job", "--nodes", "3"], "3 nodes are too many for 2 rank(s)"),
        (["--single-job", "--nproc-per-node", "3"], "makes 3 ranks, and the configuration has 2"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments: list[str], said: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["slurm", "render", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ssd: error: ")
    assert said in line


ROOT = Path(__file__).parents[2]
EXAMPLES = {"two-jobs": {}, "single-node": {"form": "single-job"}, "multi-node": {"form": "single-job", "nodes": 5}}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_are_what_is_rendered(name: str) -> None:
    """After a change of the templates: python -m tests.unit.test_slurm writes them again."""
    for path, text in examples(name).items():
        assert path.read_text() == text, f"{path} is not what is rendered; run python -m tests.unit.test_slurm"


def examples(name: str) -> dict[Path, str]:
    config = load_config(ROOT / "configs" / "h100_llama31_70b_1b.toml")
    fields: dict = {"config_path": Path("/etc/ssd/h100_llama31_70b_1b.toml"), "python": "/opt/ssd/bin/python"}
    scripts = render(Plan(config, **fields, **EXAMPLES[name]))
    return {ROOT / "ops" / "slurm" / name / file: text for file, text in scripts.items()}


if __name__ == "__main__":
    for example in EXAMPLES:
        for path, text in examples(example).items():
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
