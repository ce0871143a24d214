"""The commands of docs/reason.md, from worked sums to an export, on a model that hardly learns."""

import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from megatron_sse.cli import main
from megatron_sse.config import load_config
from megatron_sse.parallel.groups import destroy_groups, init_groups
from megatron_sse.rl.run import PolicyRun, open_problems
from megatron_sse.tools import arithmetic, bench_prefixes, chains, reasoning_study
from megatron_sse.tools.reasoning_measure import CHOSEN, choose_checkpoint
from megatron_sse.training.loop import Run, Signals
from tests.training.support import cpu
from tests.workers import run_workers

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "reason.md").read_text()
COMMANDS = re.findall(r"^    ((?:\./run\.sh|\.venv/bin/).*)$", PAGE, re.MULTILINE)
SMALL = ["model.hidden_size=32", "training.steps=2", "training.micro_batch_size=2"]
FEW = ["rl.prompts_per_step=2", "rl.group_size=2", "rl.max_new_tokens=6"]
SMALLER = {
    "configs/rl_arithmetic_sft.yaml": ["training.global_batch_size=2"],
    "configs/rl_arithmetic.yaml": FEW,
    "configs/rl_chains_sft.yaml": ["training.global_batch_size=2"],
    "configs/rl_chains.yaml": FEW,
}


def train(folder: Path, name: str) -> None:
    """Run one of the page's configurations in a process of the pool."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        config = load_config(name, [*SMALL, *SMALLER[name]])
        weights = None
        if config.checkpoint.load_weights is not None:
            weights = Path(config.checkpoint.load_weights) / "checkpoints/iter_0000002"
        given = config, init_groups(), cpu(), None, weights
        run = Run(*given) if config.rl is None else PolicyRun(open_problems(config), *given)
        run.run(Signals())
        destroy_groups()
    finally:
        os.chdir(before)


def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    Path("configs").symlink_to(ROOT / "configs")
    assert len(COMMANDS) == 13
    for command in COMMANDS:
        program, *arguments = shlex.split(command)
        if program == "./run.sh":
            run_workers(1, train, tmp_path, arguments[0])
        elif tool := next((each for each in (arithmetic, chains) if each.__name__ in arguments), None):
            monkeypatch.setattr(sys, "argv", [*arguments[1:], "--held-out", "5"])
            tool.main()
        elif "megatron_sse.tools.reasoning_study" in arguments:
            # Its processes take minutes; tests/tools/test_reasoning_study.py runs it.
            options = reasoning_study.parse(arguments[2:])
            assert [len(runs) for runs in reasoning_study.plan(options, {})] == [4, 12]
        elif "megatron_sse.tools.bench_prefixes" in arguments:
            small = ["--prompt", "9", "--answer", "2", "--repeats", "1"]
            monkeypatch.setattr(sys, "argv", ["bench_prefixes", *arguments[2:], *small])
            bench_prefixes.main()
        else:
            assert main(arguments) == 0
    printed = capsys.readouterr().out
    # 2 prompts, each once but for its last token, and 8 times 3 tokens behind it, in sequences of 33 tokens.
    assert "tokens computed: 198 without, 66 with, ratio 3.00" in printed
    assert printed.count("solve: data/arithmetic/held_out.jsonl, temperature ") == 2 and "pass@8" in printed
    [solved] = json.loads(Path("runs/rl_arithmetic/solve/results.json").read_text())["solve"]
    assert solved["prompts"] == 5 and solved["tries"] == 8 and solved["cut_off"] > 0
    assert 0 <= solved["pass_at_1"] <= solved["pass_at_k"] <= 1 and solved["majority"] <= solved["pass_at_k"]
    assert Path("reasoner/tokenizer.json").is_file()
    check_choice(Path("runs/rl_arithmetic_sft"))


def check_choice(run: Path) -> None:
    """The first checkpoint that solves a share in the range is where reinforcement learning starts, else the last."""
    first, second = (run / f"checkpoints/iter_{step:07d}" for step in (2, 4))
    for low, high, steps in ((-2.0, -1.0, [2, 4]), (0.5, 1.0, [2, 4]), (0.0, 1.0, [2])):
        shutil.copytree(first, second)
        points = choose_checkpoint(run, "data/arithmetic/held_out.jsonl", 6, low, high)
        assert [point["step"] for point in points] == steps and points[0]["accuracy"] == 0
        assert [path.name for path in (run / CHOSEN).iterdir()] == [f"iter_{steps[-1]:07d}"]
    assert second.is_dir() and not first.is_dir()


def test_sums_are_worked_out() -> None:
    assert arithmetic.work_out(58, 67) == "slow 8+7=15 5+6+1=12\n125" and arithmetic.ask(58, 67) == "58+67="
    assert arithmetic.work_out(58, 67, quick=True) == "quick 8+7=15 5+6=11\n115"
    assert arithmetic.work_out(12, 34) == "slow 2+4=6 1+3=4\n46"


def test_chains_are_worked_out() -> None:
    assert chains.work_out(7, 8, 3) == "slow 03:7+8=5 02:8+5=3 01:5+3=8\n8" and chains.ask(7, 8, 3) == "7,8,03="
    assert chains.work_out(7, 8, 3, quick=True) == "quick 02:7+8=5 01:8+5=3\n3"
    assert chains.work_out(7, 8, 2, quick=True) == "quick 02:7+8=5 01:8+5=3\n3"
    lengths = [len(chains.work_out(0, 0, count)) for count in chains.COUNTS]
    assert 200 <= min(lengths) and max(lengths) <= 540
