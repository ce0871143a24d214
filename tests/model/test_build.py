"""What is said while a model is built."""

from dataclasses import replace

import pytest

from megatron_sse.config import ModelConfig
from megatron_sse.model.build import warn_of_slow_recurrences
from megatron_sse.recurrence import RECURRENCES
from tests.model.support import cpu, run_config


@pytest.mark.parametrize(("has_triton", "device", "lines"), [(False, "cuda", 1), (False, "cpu", 0), (True, "cuda", 0)])
def test_recurrences_without_triton_kernels(
    has_triton: bool, device: str, lines: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = replace(RECURRENCES["gdn"], has_triton=has_triton)
    monkeypatch.setattr(ModelConfig, "recurrences", lambda self: {row})
    sse = {"num_heads": 2, "head_dim": 8, "recurrence": "gdn"}
    config = run_config({"num_layers": 1, "hidden_size": 32, "vocab_size": 64, "layers": "sse", "sse": sse})
    warn_of_slow_recurrences(config, replace(cpu(), type=device))
    assert [record.getMessage() for record in caplog.records if "Triton" in record.getMessage()] == [
        "gdn layers: torch, slow (this recurrence has no Triton kernels yet)"
    ] * lines
