"""The console line of a training step."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Progress:
    """The numbers of a step's report.

    Attributes:
        step, steps: this step, counted from 1, and the steps of the run.
        loss, balance_loss: in nats per token.
        tokens_per_second: of all processes together.
        tflops_per_gpu: per GPU, or per process on a CPU.
        mfu: model FLOPs utilisation as a fraction; None where the GPU's peak is not known.
        memory_gib: peak memory of this process.
        seconds_left: estimate for the rest of the run.
        skip: why the optimizer did not step; None where it did.
    """

    step: int
    steps: int
    loss: float
    balance_loss: float | None
    learning_rate: float
    grad_norm: float
    tokens_per_second: float
    tflops_per_gpu: float
    mfu: float | None
    memory_gib: float
    seconds_left: float
    skip: str | None

    def line(self) -> str:
        """Return the console line."""
        parts = [f"step {self.step}/{self.steps}", f"loss {self.loss:.4f}"]
        if self.balance_loss is not None:
            parts.append(f"balance {self.balance_loss:.4f}")
        parts += [f"lr {self.learning_rate:.2e}", f"grad norm {self.grad_norm:.3f}"]
        parts += [f"{self.tokens_per_second:,.0f} tokens/s", f"{self.tflops_per_gpu:.3g} TFLOP/s"]
        if self.mfu is not None:
            parts.append(f"MFU {100 * self.mfu:.1f} %")
        parts += [f"memory {self.memory_gib:.2f} GiB", f"{duration(self.seconds_left)} left"]
        if self.skip is not None:
            parts.append(f"SKIPPED: {self.skip}")
        return " | ".join(parts)

    def scalars(self) -> dict[str, float]:
        """Return the values by TensorBoard name."""
        values = {
            "train/loss": self.loss,
            "train/balance_loss": self.balance_loss,
            "optimizer/learning_rate": self.learning_rate,
            "optimizer/grad_norm": self.grad_norm,
            "speed/tokens_per_second": self.tokens_per_second,
            "speed/tflops_per_gpu": self.tflops_per_gpu,
            "speed/mfu": self.mfu,
            "memory/peak_gib": self.memory_gib,
        }
        return {name: value for name, value in values.items() if value is not None}


def duration(seconds: float) -> str:
    """Format seconds as 42s, 3m05s, 2h07m or 1d04h."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02d}h"
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
