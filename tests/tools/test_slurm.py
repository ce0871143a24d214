"""The Slurm job script, with stand-ins for Slurm's commands and run.sh."""

import os
import re
import shlex
import signal
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = ROOT / "tools" / "slurm.sbatch"
PAGE = (ROOT / "docs" / "multi_node.md").read_text()

STAND_INS = {
    # Passes signals on, as Slurm's srun does.
    "bin/srun": 'while [[ "$1" == --* ]]; do echo "srun $1"; shift; done\nexec "$@"\n',
    "bin/scontrol": 'echo "scontrol $*"\n',
    "bin/sbatch": 'while [[ "$1" == --* ]]; do shift; done\nexport SLURM_JOB_ID=50123\nexec bash "$@"\n',
    "run.sh": (
        'trap "echo saved; exit $STATUS" TERM\necho "run.sh $*, port $MASTER_PORT"\nwhile :; do sleep 0.05; done\n'
    ),
}


def start_job(folder: Path, command: list[str], status: int) -> subprocess.Popen[str]:
    """Start a job whose run ends with a given status when it gets a signal."""
    for name, script in STAND_INS.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("#!/usr/bin/env bash\n" + script)
        path.chmod(0o755)
    (folder / "tools").mkdir()
    (folder / "tools/slurm.sbatch").write_text(TEMPLATE.read_text())
    environment = os.environ | {"PATH": f"{folder}/bin:{os.environ['PATH']}", "STATUS": str(status)}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True)


@pytest.mark.parametrize(
    ("signum", "status", "requeued"),
    [(signal.SIGUSR1, 0, True), (signal.SIGTERM, 0, False), (signal.SIGUSR1, 3, False)],
)
def test_job(signum: int, status: int, requeued: bool, tmp_path: Path) -> None:
    """The command of the docs runs, and a run that has saved at its time limit is requeued."""
    [line] = re.findall("^    (sbatch .*)$", PAGE, re.MULTILINE)
    job = start_job(tmp_path, shlex.split(line), status)
    assert job.stdout is not None
    config, *rest = line.partition("slurm.sbatch ")[2].split()
    expected = ["srun --ntasks-per-node=1", "srun --kill-on-bad-exit=1"]
    expected.append(f"run.sh {' '.join([config, *rest])}, port {20000 + 50123 % 20000}")
    assert [job.stdout.readline().strip() for _ in expected] == expected
    assert (ROOT / config).is_file()
    job.send_signal(signum)
    output, errors = job.communicate()
    assert (job.returncode, errors) == (status, "")
    assert output.splitlines() == ["saved", *(["scontrol requeue 50123"] if requeued else [])]
