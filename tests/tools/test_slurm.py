"""tools/slurm/train.sh with stand-ins for srun, scontrol and the program."""

import importlib
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "slurm" / "train.sh"

SRUN = """#!/usr/bin/env bash
echo "$*" > "$LOGS/srun"
while [[ $1 == --* ]]; do shift; done
highest=0
for node in 0 1; do
    SLURM_NODEID=$node SLURM_GPUS_ON_NODE=4 "$@" &
    pids[node]=$!
done
for pid in "${pids[@]}"; do
    wait "$pid"
    code=$?
    [ $code -gt $highest ] && highest=$code
done
exit $highest
"""
SCONTROL = """#!/usr/bin/env bash
case $1 in
    show) [ "$3" = "node[7-8]" ] && printf 'node7\\nnode8\\n';;
    requeue) echo "$2" >> "$LOGS/requeued"; exit "${REQUEUE_FAILS:-0}";;
esac
"""
PROGRAM = """#!{python}
import json, os, sys
node = os.environ["SLURM_NODEID"]
names = ("FCCLIP_GRACE_SECONDS", "MASTER_PORT")
content = {{"words": sys.argv[1:], "folder": os.getcwd(), **{{name: os.environ.get(name) for name in names}}}}
open(os.path.join(os.environ["LOGS"], f"program_{{node}}"), "w").write(json.dumps(content))
sys.exit(int(os.environ["CODES"].split()[int(node)]))
"""


@pytest.fixture
def submit(tmp_path) -> Callable[..., subprocess.CompletedProcess]:
    """Runs the script as SLURM would on the first of two machines. `codes`: what the program leaves with on each."""
    (tmp_path / "bin").mkdir()
    for name, content in {"srun": SRUN, "scontrol": SCONTROL, "program": PROGRAM.format(python=sys.executable)}.items():
        (tmp_path / "bin" / name).write_text(content)
        (tmp_path / "bin" / name).chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "FCCLIP_", "MASTER_"))}
    job = {
        "SLURM_JOB_ID": "30123",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "PYTHON": "program",
        "LOGS": str(tmp_path),
    }

    def run(*words: str, codes: str = "0 0", **variables: str | None) -> subprocess.CompletedProcess:
        environment = kept | job | {"CODES": codes} | variables
        return subprocess.run(
            ["bash", str(SCRIPT), *words],
            env={name: value for name, value in environment.items() if value is not None},
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )

    return run


def started(folder: Path, node: int) -> dict:
    return json.loads((folder / f"program_{node}").read_text())


def test_each_machine_starts_one_launcher_with_the_published_options(submit, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    train_net = importlib.import_module("train_net")
    run = submit("--config-file", "a b.yaml", "OUTPUT_DIR", "/shared/run 1")
    assert run.returncode == 0, run.stderr
    for node in range(2):
        content = started(tmp_path, node)
        assert content["words"][0] == "train_net.py" and content["folder"] == str(ROOT)
        assert content["MASTER_PORT"] is None and content["FCCLIP_GRACE_SECONDS"] == "150"
        args = train_net.parse_arguments(content["words"][1:])
        assert (args.num_gpus, args.num_machines, args.machine_rank) == (4, 2, node)
        assert args.dist_url == "tcp://node7:30123" and args.resume
        assert args.config_file == "a b.yaml" and args.opts == ["OUTPUT_DIR", "/shared/run 1"]
    assert {"--nodes=2", "--ntasks-per-node=1", "--wait=1800"} <= set(
        shlex.split((tmp_path / "srun").read_text().splitlines()[0])
    )
    assert not (tmp_path / "requeued").exists()


def test_port_and_number_of_processes_can_be_given(submit, tmp_path):
    assert submit("--config-file", "a.yaml", MASTER_PORT="4711", FCCLIP_PROCESSES="3").returncode == 0
    words = " ".join(started(tmp_path, 1)["words"])
    assert "tcp://node7:4711" in words and "--num-gpus 3" in words


@pytest.mark.parametrize("codes", ["75 75", "75 0", "138 138", "1 1", "0 1", "143 75", "137 137"])
def test_a_training_that_was_asked_to_stop_and_no_other_goes_back_into_the_queue(submit, tmp_path, codes):
    run = submit("--config-file", "a.yaml", codes=codes)
    if max(map(int, codes.split())) in (75, 138):
        assert run.returncode == 0 and "goes back into the queue" in run.stdout
        assert (tmp_path / "requeued").read_text() == "30123\n"
    else:
        assert run.returncode == max(map(int, codes.split()))
        assert not (tmp_path / "requeued").exists()


def test_a_job_that_cannot_be_requeued_says_what_to_do(submit):
    run = submit("--config-file", "a.yaml", codes="75 75", REQUEUE_FAILS="1")
    assert run.returncode == 75 and "submit it again with the same words" in run.stderr


@pytest.mark.parametrize(
    ("words", "variables", "message"),
    [
        ((), {}, "nothing to train"),
        (("--config-file", "a"), {"SLURM_JOB_ID": None}, "submit this script with sbatch"),
        (("--config-file", "a"), {"SLURM_SUBMIT_DIR": "/"}, "no train_net.py in /: submit from the root"),
        (("--config-file", "a"), {"SLURM_JOB_NODELIST": "x"}, "does not name the machines of 'x'"),
    ],
)
def test_a_start_that_cannot_work_is_refused(submit, words, variables, message):
    run = submit(*words, **variables)
    assert run.returncode == 2 and message in run.stderr


def test_slurm_is_asked_for_the_signal_and_may_requeue_the_job():
    head = SCRIPT.read_text().split("\nset -uo pipefail")[0]
    assert "#SBATCH --signal=USR1@180" in head and "#SBATCH --requeue" in head
    assert all(line.startswith("#") or not line for line in head.splitlines()), "sbatch stops at the first command"
