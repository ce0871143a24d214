from dataclasses import replace

import pytest

from megatron_sse.monitor.line import Progress, duration

PROGRESS = Progress(
    step=12,
    steps=200,
    loss=3.21044,
    balance_loss=1.00216,
    learning_rate=1e-3,
    grad_norm=0.8312,
    tokens_per_second=12345.6,
    tflops_per_gpu=0.01234,
    mfu=0.4123,
    memory_gib=1.234,
    seconds_left=185.2,
    skip=None,
)


def test_line_with_everything():
    assert PROGRESS.line() == (
        "step 12/200 | loss 3.2104 | balance 1.0022 | lr 1.00e-03 | grad norm 0.831 | 12,346 tokens/s | 0.0123 TFLOP/s"
        " | MFU 41.2 % | memory 1.23 GiB | 3m05s left"
    )


def test_what_is_not_known_is_left_out():
    progress = replace(PROGRESS, mfu=None, balance_loss=None)
    assert "MFU" not in progress.line() and "balance" not in progress.line()
    assert set(PROGRESS.scalars()) - set(progress.scalars()) == {"speed/mfu", "train/balance_loss"}


def test_a_skipped_step_says_so():
    assert (
        replace(PROGRESS, skip="loss or gradient not finite", loss=float("nan"))
        .line()
        .endswith("left | SKIPPED: loss or gradient not finite")
    )


@pytest.mark.parametrize(
    "seconds, text", [(0.2, "0s"), (59.6, "1m00s"), (42, "42s"), (3 * 3600 + 420, "3h07m"), (100_000, "1d03h")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text
