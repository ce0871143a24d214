"""The study of recall against state: its arms, a tiny study, and the report."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_sse.config import ignored_settings, load_config
from megatron_sse.tools.plane_arms import ARMS, LEARNING_RATES, arm_settings
from megatron_sse.tools.plane_report import write_report
from megatron_sse.tools.recall_plane import main
from megatron_sse.tools.studies.runs import ROOT
from megatron_sse.tools.studies.sizes import TOLERANCE, num_parameters, state_elements

CONFIG = ROOT / "configs" / "recall_mqar.yaml"


def test_arms() -> None:
    """Parameters are equal, states are what the arms' names say, and every setting has an effect."""
    configs = {arm: load_config(CONFIG, arm_settings(arm, CONFIG, [])) for arm in ARMS}
    wanted = num_parameters(load_config(CONFIG).model)
    for arm, config in configs.items():
        assert ignored_settings(config) == []
        assert num_parameters(config.model) == pytest.approx(wanted, rel=TOLERANCE)
        assert state_elements(config) == config.model.num_layers * ARMS[arm].state
        assert ARMS[arm].touched <= ARMS[arm].state
    assert len({config.model_dump_json() for config in configs.values()}) == len(ARMS)


def test_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A study of one arm and one learning rate; the second start finds nothing left to do."""
    arguments = ["--output", str(tmp_path), "--arms", "values_512_pairs_16", "--seeds", "1", "--rates", "3e-3"]
    arguments += ["--samples", "2", "training.steps=2", "training.global_batch_size=2", "training.micro_batch_size=2"]
    arguments += ["training.validation_batches=1"]
    assert main(arguments) == 0
    assert "| 16 | 512 | values | 512 |" in capsys.readouterr().out
    [result] = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert result["tokens"] == 2 * 2 * 48 and result["cpu_seconds"] > 0
    assert main(arguments) == 0
    assert "1 runs, 1 already done" in capsys.readouterr().out


def made(arm: str, rate: float, seed: int, accuracy: float) -> dict[str, Any]:
    result = {"arm": arm, "learning_rate": rate, "seed": seed, "accuracy": accuracy, "validation": 1 - accuracy}
    return result | {
        "parameters": 1000,
        "tokens": 2000,
        "cpu_seconds": 3.0,
        "resumed": False,
        "commit": "abc",
        "settings": {},
    }


def test_report(tmp_path: Path) -> None:
    """The best rate's accuracies are shown, those of other rates are not."""
    low, high = LEARNING_RATES
    found = {
        "partitions_2048_pairs_32": [made("partitions_2048_pairs_32", rate, 0, rate * 10) for rate in (low, high)],
        "heads_512_pairs_16": [made("heads_512_pairs_16", low, seed, 0.5 + seed / 10) for seed in (0, 1)],
    }
    text = write_report(tmp_path, found)
    assert "| 32 | 2,048 | partitions | 256 | 1,000 | 0.01 | 0.100 | 1500 |" in text
    assert "| 16 | 512 | heads | 512 | 1,000 | 0.003 | 0.500, 0.600 | 1500 |" in text
    assert (tmp_path / "plane.png").is_file()
