"""The study of reasoning: equal sizes, what is left to train, its report, and (slow) two small runs from end to end."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_sse.cli import main as command
from megatron_sse.config import ignored_settings, load_config
from megatron_sse.tools import arithmetic
from megatron_sse.tools.reasoning_measure import CHOSEN, read_curves
from megatron_sse.tools.reasoning_report import write_report
from megatron_sse.tools.reasoning_study import ARMS, arm_settings, main, parse, plan, read_results
from megatron_sse.tools.studies.results import Result, write_results
from megatron_sse.tools.studies.runs import ROOT
from megatron_sse.tools.studies.sizes import num_parameters

SFT, RL = (ROOT / "configs" / f"rl_arithmetic{half}.yaml" for half in ("_sft", ""))


@pytest.mark.parametrize("arm", ARMS)
def test_arm(arm: str) -> None:
    """Arms are as large as the files' model, and every setting has an effect, in both files."""
    configs = [load_config(path, arm_settings(arm, SFT, [])) for path in (SFT, RL)]
    assert [ignored_settings(config) for config in configs] == [[], []]
    wanted = num_parameters(load_config(SFT, []).model)
    assert num_parameters(configs[0].model) == pytest.approx(wanted, rel=0.02)
    kinds = {"sse": {"sse"}, "sse_h": {"sse", "softmax"}, "gla": {"sse"}, "softmax": {"softmax"}}
    assert set(configs[0].model.layer_kinds()) == kinds[arm]
    assert (arm == "gla") == (configs[0].model.sse.num_partitions == 0)


def result(arm: str, seed: int | None, shares: dict[int, float], settings: dict[str, Any]) -> Result:
    points = [{"step": step, "accuracy": share, "reward": share / 2} for step, share in shares.items()]
    sizes = {"parameters": 1000, "state_elements": 20, "cpu_seconds": 9.0, "resumed": False, "seconds": 10.0}
    about = {"between": [0.5, 0.6], "commit": "abc", "versions": {"torch": "2"}, "settings": settings}
    return {"arm": arm, "seed": seed, "points": points, **sizes, **about}


def make_results(output: Path, *arguments: str) -> None:
    """Write results.json as of a finished study of these arguments."""
    runs = [run for runs in plan(parse(["--output", str(output), *arguments]), {}) for run in runs]
    made = []
    for run in runs:
        seed = run.config.training.seed if run.config.rl else None
        made.append(result(run.key[0], seed, {0: 0.5, 10: 0.9}, run.description()))
    write_results(output, made)


def test_what_is_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A clone has results but no weights: there is nothing to train, and other settings are refused."""
    arguments = ["--output", str(tmp_path), "--arms", "gla,softmax", "--seeds", "2"]
    make_results(tmp_path, *arguments[2:])
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "2 runs, 2 already done" in said and "4 runs, 4 already done" in said and "Missing" not in said
    assert not list(tmp_path.glob("*/"))
    for more, error in (
        (["model.hidden_size=32"], "results.json has gla, sft, with other settings"),
        (["--steps", "7"], "results.json has gla, sft, with other settings"),
        (["training.steps=7"], "results.json has gla, seed 0, with other settings"),
        (["--between", "0.4", "0.6"], "--between: got [0.4, 0.6], but the result of "),
    ):
        assert main([*arguments, *more]) == 2
        assert error in capsys.readouterr().err


def test_report(tmp_path: Path) -> None:
    """Mean and range over seeds by their common steps, what is missing, arms without the second half, the picture."""
    settings = {"training": {"steps": 7}}
    made = [
        result("softmax", 1, {0: 0.5, 5: 0.6, 10: 0.7}, settings),
        result("softmax", 0, {0: 0.5, 10: 0.9}, settings),
    ]
    made += [result("softmax", None, {25: 0.1, 50: 0.52}, settings), result("sse", None, {25: 0.3}, settings)]
    write_results(tmp_path, made)
    found = read_results(tmp_path)
    assert [(arm, [run["seed"] for run in runs]) for arm, runs in found.items()] == [
        ("sse", [None]),
        ("softmax", [None, 0, 1]),
    ]
    text = write_report(tmp_path, found, [("sse", 0), ("softmax", 0)])
    assert "Missing: sse, seed 0." in text and "Commits: abc. Versions: torch 2." in text
    assert "| softmax | 1,000 | 20 | 50 | 0.520 | 2 | 0.500 | 0.800 (0.700, 0.900) | 9 | 9 |" in text
    assert "| sse | 1,000 | 20 | 25 | 0.300 | 0 | - | - | 9 | - |" in text
    assert (tmp_path / "report.md").read_text() == text and (tmp_path / "reasoning.png").stat().st_size > 1000
    assert read_results(tmp_path) == found


def test_curves(tmp_path: Path) -> None:
    """Of a step that a resumed run has taken again the newer values count; other scalars are left out."""
    lines: list[dict[str, float]] = [{"step": 0, "validation/pass_at_1": 0.5}, {"step": 1, "rl/reward": 0.25}]
    lines += [{"step": 2, "rl/reward": 0.5}, {"step": 1, "rl/reward": 0.75, "loss": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    wanted = [{"step": 0, "accuracy": 0.5}, {"step": 1, "reward": 0.75}, {"step": 2, "reward": 0.5}]
    assert read_curves(tmp_path / "metrics.jsonl") == wanted


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--arms", "mamba"], "--arms: got 'mamba', allowed sse, sse_h, gla, softmax, each once"),
        (["--seeds", "0"], "--seeds: got 0, allowed 1 or more"),
        (["--between", "0.6", "0.5"], "--between: got 0.6 0.5, allowed two rising numbers from 0 to 1"),
        (["--report"], "has no results"),
        (["--rl", str(SFT)], "--rl: got "),
        (["model.ffn_hidden_size=4"], "--config: sse cannot have "),
        (["model.nothing=1"], "model.nothing: got an unknown key"),
    ],
)
def test_errors(arguments: list[str], error: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Errors are one line, and nothing is trained."""
    assert main(["--output", str(tmp_path), *arguments]) == 2
    said = capsys.readouterr().err
    assert error in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Two arms imitate and learn; another seed starts from the weights that are kept, or that are made again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["arithmetic", "data/arithmetic", "--held-out", "5"])
    arithmetic.main()
    given = ["data", "build", "data/arithmetic/sft.jsonl", "--format", "chat", "--output", "data/arithmetic/sft"]
    assert command(given) == 0
    small = RL.read_text().replace("prompts_per_step: 32", "prompts_per_step: 2")
    Path("rl.yaml").write_text(small.replace("max_new_tokens: 40", "max_new_tokens: 6"))
    arguments = ["--output", "out", "--arms", "gla,softmax", "--steps", "2", "--rl", "rl.yaml"]
    arguments += ["training.steps=2", "model.hidden_size=32"]
    assert main([*arguments, "--seeds", "1"]) == 0
    assert "softmax, seed 0: accuracy " in capfd.readouterr().out
    assert not list(Path("out").glob("*/*/checkpoints")) and list(Path("out/gla/sft", CHOSEN).glob("iter_*"))
    shutil.rmtree(Path("out/softmax/sft", CHOSEN))
    assert main([*arguments, "--seeds", "2"]) == 0
    said = capfd.readouterr().out
    assert "2 runs, 1 already done\n1 of 1: softmax, sft" in said and "4 runs, 2 already done" in said
    assert "Missing" not in Path("out/report.md").read_text()
