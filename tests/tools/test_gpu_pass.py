"""The pass over one GPU: its stages, limits, table and packed results, with a stand-in for Python; and its wheels."""

import os
import re
import subprocess
import tarfile
from pathlib import Path

import pytest

from megatron_sse.tools.gpu_wheels import PACKAGES, PYTHONS, normalize, read_pins
from megatron_sse.tools.profile_summary import summarize

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "gpu_pass.sh"


def run_pass(folder: Path, behaviour: dict[str, str], seconds: int = 60) -> tuple[int, dict[str, str], list[str]]:
    """Run the pass; return its status, the results by stage, and the commands of the stages that were started.

    behaviour: what a command does that contains a text; others pass.
    """
    cases = "".join(f'  *"{text}"*) {action} ;;\n' for text, action in behaviour.items())
    stand_in = folder / "bin" / "compute-sanitizer"
    stand_in.parent.mkdir(parents=True)
    stand_in.write_text(f'#!/bin/sh\necho "$*" >>{folder}/commands\necho said "$*"\ncase "$*" in\n{cases}esac\n')
    stand_in.chmod(0o755)
    (folder / "bin" / "python").symlink_to(stand_in)
    environment = os.environ | {"PYTHON": str(folder / "bin" / "python"), "GPU_PASS_SECONDS": str(seconds)}
    environment["PATH"] = f"{folder / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run([SCRIPT, folder / "out"], env=environment, capture_output=True, text=True)
    rows = re.findall(r"^\| (\w+) \| ([^|]+?) \| ", (folder / "out" / "summary.md").read_text(), re.MULTILINE)
    assert (folder / "out" / "summary.md").read_text() in done.stdout
    return done.returncode, dict(rows[1:]), (folder / "commands").read_text().splitlines()


def test_all_stages_pass(tmp_path: Path) -> None:
    status, results, commands = run_pass(tmp_path, {})
    assert status == 0 and set(results.values()) == {"pass"}
    assert len(commands) == len(results)
    with tarfile.open(tmp_path / "out" / "results.tgz") as archive:
        names = archive.getnames()
        summary = archive.extractfile("summary.md")
        assert summary is not None and summary.read().decode() == (tmp_path / "out" / "summary.md").read_text()
    assert {f"logs/{stage}.log" for stage in results} <= set(names)


def test_a_failure_and_a_limit_do_not_stop_the_others(tmp_path: Path) -> None:
    behaviour = {"-k small": "echo broken; exit 3", "steps=12": "exec sleep 1000"}
    status, results, _ = run_pass(tmp_path, behaviour, seconds=6)
    assert status == 1
    assert results["machine"] == "pass" and results["small"] == "FAIL: exit status 3"
    assert results["train"] == "FAIL: over its limit"
    # The time for all was used up by then.
    assert results["profile"] == results["memcheck"] == "not reached"
    assert "broken" in (tmp_path / "out" / "logs" / "small.log").read_text()
    with tarfile.open(tmp_path / "out" / "results.tgz") as archive:
        assert "logs/train.log" in archive.getnames()


def test_results_are_packed_after_each_stage(tmp_path: Path) -> None:
    """When the third stage starts, the archive has what the first two said."""
    check = f"tar -tzf {tmp_path}/out/results.tgz | grep -c 'logs/.*log'; exit 7"
    _, results, _ = run_pass(tmp_path, {"-k small": check})
    assert results["small"] == "FAIL: exit status 7"
    assert (tmp_path / "out" / "logs" / "small.log").read_text().splitlines()[-1] == "2"


def test_every_limit_and_command_exists(tmp_path: Path) -> None:
    """Each stage's module or test file is there, with tests that its -k chooses."""
    _, _, commands = run_pass(tmp_path, {})
    for command in commands:
        for module in re.findall(r"-m (megatron_sse[\w.]*)", command):
            assert (ROOT / (module.replace(".", "/") + ".py")).exists() or (ROOT / module.replace(".", "/")).is_dir()
        for path in re.findall(r"\b((?:tests|tools|configs)/\S+)", command):
            assert (ROOT / path).exists(), command


def test_the_page_lists_the_stages(tmp_path: Path) -> None:
    _, results, _ = run_pass(tmp_path, {}, seconds=600)
    page = (ROOT / "docs" / "gpu_pending.md").read_text()
    summary = (tmp_path / "out" / "summary.md").read_text()
    listed = re.findall(r"^\| `(\w+)` \| (\d+) \|", page, re.MULTILINE)
    limits = re.findall(r"^\| (\w+) \| pass \| \d+ \| (\d+) \|", summary, re.MULTILINE)
    assert listed == limits and len(limits) == len(results)


def test_pins_are_read_with_their_markers() -> None:
    lines = ["numpy==2.4.6", 'megatron-core==0.16.1; python_version < "3.12"']
    lines += ['megatron_core==0.19.2; python_version >= "3.12"']
    assert read_pins("\n".join(lines)) == {
        ("numpy", "3.11"): "2.4.6",
        ("numpy", "3.12"): "2.4.6",
        ("megatron-core", "3.11"): "0.16.1",
        ("megatron-core", "3.12"): "0.19.2",
    }


@pytest.mark.parametrize("name", ["megatron-core", "numpy", "pydantic", "pydantic-core", "tensorboard", "pytest"])
def test_wheels_are_of_pinned_versions(name: str) -> None:
    pins = read_pins((ROOT / "constraints.txt").read_text())
    assert name in PACKAGES and all((normalize(name), python) in pins for python in PYTHONS)


def test_profile_summary_counts_overlapping_time_once() -> None:
    events = [
        {"cat": "kernel", "name": "a", "ts": 0.0, "dur": 10_000.0},
        {"cat": "kernel", "name": "b", "ts": 5_000.0, "dur": 10_000.0},
        {"cat": "cpu_op", "name": "c", "ts": 0.0, "dur": 90_000.0},
        {"cat": "kernel", "name": "a", "ts": 25_000.0, "dur": 5_000.0},
    ]
    first, *rest = summarize(events, rows=1)
    # 0 to 15 ms and 25 to 30 ms.
    assert first == "3 launches and copies in 30.0 ms, busy 67%"
    assert rest == ["    15.000 ms      2 x a"]
    assert list(summarize([], rows=1)) == ["no GPU events"]
