"""Checkpoints and exports that version 0.1.0 made (tests/earlier) still resume, load, score and convert.

Each was made by two steps of tests.training.support.small_run on the model in its config.yaml: on Megatron-Core 0.16.1,
or on 0.19.2 where its name says so. These tests run on both releases, so each loads what the other has saved.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from megatron_sse.score.command import run as score
from megatron_sse.score.request import Request
from tests.checkpoint.support import Trace, train_and_save
from tests.convert.support import assert_same_tensors, convert
from tests.workers import run_workers

EARLIER = Path(__file__).resolve().parents[1] / "earlier"
NAMES = ("gla", "gdn")


@pytest.fixture
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of an earlier run's folder."""
    return Path(shutil.copytree(EARLIER / request.param, tmp_path / request.param))


def resume(folder: Path, run: Path) -> Trace:
    """Take steps 3 and 4 from the checkpoint of step 2."""
    checkpoint = run / "checkpoints" / "iter_0000002"
    model = yaml.safe_load((checkpoint / "config.yaml").read_text())["model"]
    sections = {"model": model, "monitor": {"folder": str(folder / "new")}, "checkpoint": {"changed_data": "accept"}}
    return train_and_save(folder, sections, checkpoint, 4, False)[0]


@pytest.mark.parametrize("run", (*NAMES, "gdn_megatron_0_19"), indirect=True)
def test_training_resumes(run: Path, tmp_path: Path) -> None:
    trace = run_workers(1, resume, tmp_path, run)[0]
    # The same weights and steps, whatever Megatron-Core they were trained on.
    expected = json.loads((EARLIER / "losses.json").read_text())[run.name.removesuffix("_megatron_0_19")]
    assert [[losses["loss"], norm] for losses, norm in trace] == [pytest.approx(step, rel=1e-5) for step in expected]


@pytest.mark.parametrize("run", NAMES, indirect=True)
def test_logits_and_conversions(run: Path, tmp_path: Path) -> None:
    assert convert(str(run), str(tmp_path / "exported")) == 0
    assert_same_tensors(tmp_path / "exported", run / "exported")
    assert convert(str(run / "exported"), str(tmp_path / "back")) == 0
    expected = load_file(run / "logits.safetensors")["logits"]
    for folder in (run, run / "exported", tmp_path / "back"):
        output = tmp_path / "logits.safetensors"
        tokens = str(EARLIER / "tokens.safetensors")
        assert score(Request(checkpoint=str(folder), input=tokens, output=str(output))) == 0
        error = (load_file(output)["logits"] - expected).norm() / expected.norm()
        assert error < 1e-5, folder
        assert torch.isfinite(expected).all()
