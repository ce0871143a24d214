"""The commands of docs/reason.md, from worked sums to an export, on a model that hardly learns."""

import json
import os
import re
import shlex
import sys
from pathlib import Path

import pytest

from megatron_sse.cli import main
from megatron_sse.config import load_config
from megatron_sse.parallel.groups import destroy_groups, init_groups
from megatron_sse.rl.run import PolicyRun, open_problems
from megatron_sse.tools import arithmetic, bench_prefixes
from megatron_sse.training.loop import Run, Signals
from tests.training.support import cpu
from tests.workers import run_workers

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "reason.md").read_text()
COMMANDS = re.findall(r"^    ((?:\./run\.sh|\.venv/bin/).*)$", PAGE, re.MULTILINE)
SMALL = ["model.hidden_size=32", "training.steps=2", "training.micro_batch_size=2"]
SMALLER = {
    "configs/rl_arithmetic_sft.yaml": ["training.global_batch_size=2"],
    "configs/rl_arithmetic.yaml": ["rl.prompts_per_step=2", "rl.group_size=2", "rl.max_new_tokens=6"],
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
    assert len(COMMANDS) == 8
    for command in COMMANDS:
        program, *arguments = shlex.split(command)
        if program == "./run.sh":
            run_workers(1, train, tmp_path, arguments[0])
        elif "megatron_sse.tools.arithmetic" in arguments:
            monkeypatch.setattr(sys, "argv", ["arithmetic", *arguments[2:], "--held-out", "5"])
            arithmetic.main()
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


def test_sums_are_worked_out() -> None:
    assert arithmetic.work_out(58, 67) == "slow 8+7=15 5+6+1=12\n125" and arithmetic.ask(58, 67) == "58+67="
    assert arithmetic.work_out(58, 67, quick=True) == "quick 8+7=15 5+6=11\n115"
    assert arithmetic.work_out(12, 34) == "slow 2+4=6 1+3=4\n46"
