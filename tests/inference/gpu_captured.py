"""On a GPU, CUDA graphs of decode steps give the logits of plain steps."""

import pytest

from megatron_sse.inference.captured import CapturedSteps
from megatron_sse.model.language_model import LanguageModel
from tests.inference.test_captured import compare_steps


@pytest.mark.parametrize("number", [0, 1], ids=["pure", "hybrid"])
def test_replayed_steps_are_plain_steps(nets: list[LanguageModel], number: int) -> None:
    worst, _ = compare_steps(nets[number], CapturedSteps)
    assert worst < 1e-4
