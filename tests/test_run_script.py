"""run.sh, with a stand-in for the interpreter that it would install."""

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_a_symbolic_link_to_it_uses_its_own_checkout(tmp_path: Path) -> None:
    checkout, elsewhere = tmp_path / "checkout", tmp_path / "elsewhere"
    (checkout / ".venv/bin").mkdir(parents=True)
    elsewhere.mkdir()
    for name in ("run.sh", "constraints.txt", "setup.cfg"):
        shutil.copy(ROOT / name, checkout)
    python = checkout / ".venv/bin/python"
    python.write_text('#!/bin/sh\ncase "$*" in *pip*) ;; *) echo "$0 $*" ;; esac\n')
    python.chmod(0o755)
    (elsewhere / "run.sh").symlink_to(os.path.relpath(checkout / "run.sh", elsewhere))
    done = subprocess.run([elsewhere / "run.sh", "a.yaml"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{python} -m megatron_sse train a.yaml"
    assert [path.name for path in elsewhere.iterdir()] == ["run.sh"]
