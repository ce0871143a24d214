"""The study of recall: its arms, its measures, and a small study that is interrupted and resumed."""

import json
import os
import shutil
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_sse.config import RunConfig, ignored_settings, load_config
from megatron_sse.data.tasks.mqar import Recall
from megatron_sse.evaluation.read import Reader
from megatron_sse.evaluation.recall import measure_recall
from megatron_sse.model import build_model
from megatron_sse.pretrained.network import inference_groups
from megatron_sse.tools.recall_arms import ARMS, BASE, arm_settings, tabulate_arms
from megatron_sse.tools.recall_measure import SEED, look, make_samples
from megatron_sse.tools.recall_report import write_report
from megatron_sse.tools.recall_study import main
from megatron_sse.tools.studies.runs import ROOT
from megatron_sse.tools.studies.sizes import num_parameters, state_elements

CONFIG = ROOT / "configs" / "recall_mqar.yaml"
TINY = ["training.global_batch_size=2", "training.micro_batch_size=2", "training.validation_batches=1"]
TINY += ["data.train.mqar.pairs=4", "data.validation.mqar.pairs=4", "data.sequence_length=12"]
TINY += ["optimizer.warmup_steps=0"]


@pytest.fixture(scope="module")
def configs() -> dict[str, RunConfig]:
    return {arm: load_config(CONFIG, arm_settings(arm, CONFIG, [])) for arm in ARMS}


@pytest.mark.parametrize("arm", ARMS)
def test_arm(arm: str, configs: dict[str, RunConfig]) -> None:
    """Every setting of an arm has an effect, and sizes that should match do."""
    config, matched = configs[arm], ARMS[arm]
    assert ignored_settings(config) == []
    if matched.parameters_as is not None:
        wanted = num_parameters(configs[matched.parameters_as].model)
        assert num_parameters(config.model) == pytest.approx(wanted, rel=0.02)
    if matched.state_as is not None:
        assert state_elements(config) == state_elements(configs[matched.state_as])
    others = [(other.model, other.optimizer) for name, other in configs.items() if name != arm]
    assert (config.model, config.optimizer) not in others


def test_table() -> None:
    """The table says where other settings make arms unequal."""
    table = tabulate_arms([BASE, "gla_large_heads"], CONFIG, [])
    assert table.endswith("| gla_large_heads | a | 109,264 | n8k1 | 2,304 | n8k1 |")
    table = tabulate_arms(["gla_large_heads"], CONFIG, ["model.sse.num_heads=4", "model.ffn_hidden_size=8"])
    assert "| not equal: n8k1 has 48,592 | 4,608 | n8k1 |" in table
    table = tabulate_arms(["gla_large_heads"], CONFIG, ["model.sse.head_dim=16"])
    assert "| 2,304 | not equal: n8k1 has 9,216 |" in table


def test_state_elements(configs: dict[str, RunConfig]) -> None:
    """Sizes counted by hand.

    SSE: 2 layers of 9 banks of 2 heads of 8 x 8. Softmax: 96 keys and values of 64 in each of 2 layers. Hybrid: 5
    layers of the first kind and 1 of the second.
    """
    assert state_elements(configs[BASE]) == 2 * 9 * 2 * 64
    assert state_elements(configs["softmax"]) == 2 * 2 * 96 * 64
    assert state_elements(configs["hybrid6"]) == 5 * 9 * 2 * 64 + 2 * 96 * 64


def by_key(recall: Recall, first: int) -> np.ndarray:
    """Return partitions: key mod 8 for keys and their values, shifted by `first` for the key before each value."""
    bank_E = recall.tokens_E % 8
    value_p = recall.place_p - recall.distance_p
    bank_E[value_p] = bank_E[recall.place_p]
    bank_E[value_p - 1] = (bank_E[recall.place_p] + first) % 8
    return bank_E


@pytest.mark.parametrize(
    ("router", "key", "value", "chance"),
    [("key", 1, 1, 1 / 8), ("value", 0, 1, 1 / 8), ("random", 1 / 8, 1 / 8, 1 / 8), ("one", 1, 1, 1)],
)
def test_match(router: str, key: float, value: float, chance: float, configs: dict[str, RunConfig]) -> None:
    """Match of hand-made routers, which replace a model's own."""
    config = configs[BASE]
    recalls = make_samples(config.data.train[0].mqar, config.data.sequence_length, 32)
    generator = np.random.default_rng(0)
    length = config.data.sequence_length
    banks = {
        "key": lambda recall: by_key(recall, 0),
        "value": lambda recall: by_key(recall, 1),
        "random": lambda recall: generator.integers(8, size=length),
        "one": lambda recall: np.full(length, 3),
    }
    picks_T1 = torch.from_numpy(np.concatenate([banks[router](recall) for recall in recalls]))[:, None]
    with inference_groups(1) as (groups, device):
        [net] = build_model(config, groups, device)
        for layer in net.decoder.layers:
            layer.self_attention.router.replay = lambda layout: picks_T1.to(device.type)
        found = look(net.eval(), config.model, recalls)
        reader = Reader(net, config.model.vocab_size, 32, 32 * length)
        recalled = measure_recall(reader, config.data.train[0].mqar, length, 32, SEED)
    assert found["loss"] == pytest.approx(np.log(config.model.vocab_size), abs=0.5)
    assert found["accuracy"] == pytest.approx(recalled.accuracy, abs=1e-12)
    for layer in found["layers"]:
        assert sum(layer["share_N"]) == pytest.approx(1)
        assert layer["match_key"] == pytest.approx(key, abs=0.04 if router == "random" else 0)
        behind = layer["match_behind"]
        assert len(behind) == 3
        assert behind[0] == pytest.approx(value, abs=0.04 if router == "random" else 0)
        # The token after the value is another pair's key or a question, which is the pair's own only for the last pair.
        assert behind[1] == pytest.approx(31 / 32 if router == "one" else 1 / 8, abs=0.04)
        assert layer["match_chance"] == pytest.approx(chance, abs=0.04)
        assert len(layer["rank_B"]) == 9


def interrupt_when_saved(checkpoints: Path, ended: threading.Event) -> None:
    """Send SIGINT once there is a checkpoint, unless the study ends first."""
    while not ended.wait(0.05):
        if list(checkpoints.glob("iter_*")):
            os.kill(os.getpid(), signal.SIGINT)
            return


def test_study(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A study of two arms is interrupted in the first, resumed, then finds nothing left to do; it reports both."""
    output = tmp_path / "evidence"
    arguments = ["--output", str(output), "--arms", "n2k1,softmax", "--seeds", "1", "--steps", "24", "--samples", "4"]
    checkpoints = output / "n2k1/seed_0/checkpoints"
    ended = threading.Event()
    watcher = threading.Thread(target=interrupt_when_saved, args=(checkpoints, ended))
    watcher.start()
    status = main([*arguments, "--workers", "1", *TINY])
    ended.set()
    watcher.join()
    assert (status, capfd.readouterr().err) == (130, "interrupted; run the same command to resume\n")
    assert list(checkpoints.glob("iter_*")) and not list(output.glob("*/*/result.json"))
    assert not (output / "softmax").exists()

    assert main([*arguments, *TINY]) == 0
    assert "2 runs, 0 already done" in capfd.readouterr().out
    assert "resumed from" in (output / "n2k1/seed_0/train.log").read_text()
    logs = {path: path.read_text() for path in output.glob("*/*/train.log")}
    result = json.loads((output / "n2k1/seed_0/result.json").read_text())
    assert result["resumed"] and {*range(3, 25, 3)} <= {point["step"] for point in result["points"]}
    assert result["partitions"] == 2 and 0 <= result["points"][-1]["layers"][1]["match_behind"][0] <= 1
    assert not checkpoints.exists()

    # A setting that was added after the run.
    settings = output / "n2k1/seed_0/settings.json"
    begun = json.loads(settings.read_text())
    del begun["model"]["sse"]["own_read_router"]
    settings.write_text(json.dumps(begun))
    assert main([*arguments, *TINY]) == 0
    assert "2 runs, 2 already done" in capfd.readouterr().out
    assert {path: path.read_text() for path in output.glob("*/*/train.log")} == logs
    report = (output / "report.md").read_text()
    assert "| n2k1 | a | 1 |" in report and "| softmax | a | 1 |" in report and "Missing" not in report
    results = json.loads((output / "results.json").read_text())
    assert [run["arm"] for run in results["runs"]] == ["n2k1", "softmax"]
    assert results["runs"][0]["accuracy"] == pytest.approx(result["accuracy"], rel=1e-6)
    assert {path.stem for path in output.glob("*.png")} == {"accuracy", "partitions", "match", "training"}

    assert main(["--report", *arguments, "--seeds", "2"]) == 0
    assert "Missing: n2k1, seed 1; softmax, seed 1." in capfd.readouterr().out
    assert main([*arguments, *TINY, "optimizer.learning_rate=1e-3"]) == 2
    assert "is a run with other settings" in capfd.readouterr().err

    # A clone has results.json but no folders of runs.
    clone = tmp_path / "clone"
    clone.mkdir()
    shutil.copy(output / "results.json", clone)
    arguments[1] = str(clone)
    assert main([*arguments, *TINY]) == 0
    assert "2 runs, 2 already done" in capfd.readouterr().out
    assert json.loads((clone / "results.json").read_text()) == results and not list(clone.glob("*/"))
    assert main([*arguments, *TINY, "optimizer.learning_rate=1e-3"]) == 2
    assert "results.json has n2k1, seed 0, with other settings" in capfd.readouterr().err
    (clone / "results.json").write_text("{}")
    assert main([*arguments, *TINY]) == 2
    assert "was not written by this study" in capfd.readouterr().err


def test_report(tmp_path: Path) -> None:
    """Report of hand-made accuracies: numbers over seeds, expectations, and every plot."""
    found = {}
    accuracies = {BASE: [0.7, 0.9, 0.8], "n16k1": [0.5, 0.6, 0.7], "no_balance": [0.6], "no_weights": [0.55]}
    for arm, values in (accuracies | {"gla": [0.4], "softmax": [1.0]}).items():
        layer = {"layer": 2, "rank_B": [4.0, 3.0, 2.0], "share_N": [0.75, 0.25]}
        layer |= {"match_key": 0.5, "match_behind": [0.6], "match_chance": 0.2}
        layers = [] if arm in ("gla", "softmax") else [layer]
        found[arm] = [
            {"seed": seed, "accuracy": value, "loss": 1.0, "seconds": 9.0, "parameters": 10, "state_elements": 20}
            | {"partitions": 8, "samples": 4, "commit": "abc", "settings": {"training": {"steps": 7}}}
            | {"points": [{"step": step, "accuracy": value / 2 * step, "layers": layers} for step in (1, 2)]}
            for seed, value in enumerate(values)
        ]
    text = write_report(tmp_path, found, [(BASE, 0), (BASE, 3), ("gdn", 0)])
    assert "Missing: n8k1, seed 3; gdn, seed 0." in text
    claims = ", ".join(ARMS[BASE].claims)
    assert f"| n8k1 | {claims} | 3 | 0.800 | 0.700 | 0.900 | 0.800 | 0.082 | 0.600 | 0.200 | 10 | 20 | 9 |" in text
    assert "- n8k1 at least 0.80: holds\n- n8k1 at least 0.30 above no_weights: does not hold\n" in text
    assert "- gla at most 0.50: holds\n- softmax at least 0.99: holds\n" in text
    assert {path.stem for path in tmp_path.glob("*.png")} == {"accuracy", "partitions", "match", "training"}


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--arms", "n3k1"], "--arms: got 'n3k1', allowed n1k1, "),
        (["--workers", "0"], "--workers: got 0, allowed 1 or more"),
        (["--report"], "has no results"),
        (["model.nothing=1"], "command line: model.nothing: got an unknown key"),
        (["--config", str(ROOT / "configs/quickstart.yaml")], "--config: got "),
        (["--output", __file__], f"--output: {__file__} cannot be written (File exists)"),
    ],
)
def test_errors(arguments: list[str], error: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Errors are one line, and nothing is trained."""
    assert main(["--output", str(tmp_path), "--arms", BASE, *arguments]) == 2
    said = capsys.readouterr().err
    assert error in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_needs_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A missing matplotlib is reported before anything is trained or matplotlib imported."""
    for name in [name for name in sys.modules if name.startswith("matplotlib") or name.endswith("recall_report")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["--output", str(tmp_path)]) == 2
    said = 'plots: needs matplotlib, which is not installed: pip install "megatron-sse[plot]"\n'
    assert capsys.readouterr() == ("", said)
