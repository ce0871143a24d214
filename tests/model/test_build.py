"""What is said while a model is built."""

from dataclasses import replace

import pytest

from megatron_sse.model.build import warn_of_slow_recurrences
from tests.model.support import cpu, run_config


@pytest.mark.parametrize(("recurrence", "device", "lines"), [("kda", "cuda", 1), ("kda", "cpu", 0), ("gdn", "cuda", 0)])
def test_recurrences_without_triton_kernels(
    recurrence: str, device: str, lines: int, caplog: pytest.LogCaptureFixture
) -> None:
    sse = {"num_heads": 2, "head_dim": 8, "recurrence": recurrence}
    config = run_config({"num_layers": 1, "hidden_size": 32, "vocab_size": 64, "layers": "sse", "sse": sse})
    warn_of_slow_recurrences(config, replace(cpu(), type=device))
    assert [record.getMessage() for record in caplog.records if "Triton" in record.getMessage()] == [
        "kda layers: torch, slow (this recurrence has no Triton kernels yet)"
    ] * lines
