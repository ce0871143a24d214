"""What the tests of rehearsals share: a scaled-down sse_h_600m, and what a rehearsal said.

Run as a program, it rehearses with faults seeded: python -m tests.tools.rehearsals RANKS [section.key=value ...]
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "sse_h_600m.yaml"
TASK = "{mqar: {pairs: 16, keys: 32, values: 32}}"
SMALL = [
    "model.hidden_size=256",
    "model.ffn_hidden_size=256",
    "model.vocab_size=97",
    "model.sse.num_heads=2",
    "model.softmax.num_heads=2",
    "model.softmax.num_kv_heads=2",
    f"data.train={TASK}",
    f"data.validation={TASK}",
    "data.sequence_length=256",
    "training.global_batch_size=3",
]
_LINE = re.compile(r"WRONG +(\d+) x in ([a-z -]+): (\S+?):(\d+) (\S+): ([^(\n]*?)(?: \(|, from |$)", re.MULTILINE)


@dataclass(frozen=True)
class Wrong:
    """A finding that has to be mended, without its line and number."""

    kind: str
    file: str
    function: str


@dataclass(frozen=True)
class Rehearsal:
    status: int
    said: str
    wrong: set[Wrong]


def rehearse(cache: Path, *arguments: str, module: str = "megatron_sse.tools.rehearse_gpu") -> Rehearsal:
    """Run a rehearsal in a process of its own: the guard has to be loaded before torch is imported."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    said = done.stdout + done.stderr
    return Rehearsal(
        done.returncode, said, {Wrong(kind, file, name) for _, _, file, _, name, kind in _LINE.findall(said)}
    )


def main(num_ranks: int, overrides: list[str]) -> int:
    """Rehearse with every fault seeded that a rehearsal can see."""
    from megatron_sse.config.load import load_config
    from megatron_sse.tools.rehearsal.guard import load_guard
    from megatron_sse.tools.rehearse_gpu import SHORT, install_stand_ins, rehearse_ranks

    config = load_config(CONFIG, [*SHORT, *overrides])
    load_guard()
    findings = install_stand_ins(num_ranks)
    seed_faults()
    return rehearse_ranks(config, num_ranks, findings)


def seed_faults() -> None:
    import torch
    import torch.distributed as dist
    from megatron.core.optimizer import clip_grads
    from megatron.core.utils import local_multi_tensor_l2_norm

    from megatron_sse.data import batch
    from megatron_sse.model import SSEMixer
    from megatron_sse.training import loop
    from megatron_sse.training.objective import LanguageModelling
    from megatron_sse.training.step import Trainer

    def seeded_eye(n: int, dtype: torch.dtype, device: Any, eye: Callable = torch.eye) -> torch.Tensor:
        return eye(n, dtype=dtype).to(device)

    def seeded_process_group(device: Any, minutes: float) -> None:
        dist.init_process_group(device.backend)

    def seeded_copy(array: Any, device: Any) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    def seeded_build(*args: Any, build: Callable = loop.build_model) -> list[Any]:
        chunks = build(*args)
        chunks[0].decoder.register_buffer("left", torch.zeros(1, device="cpu"))
        return chunks

    def seeded_step(self: Any, batches: Iterator[Any], step: Callable = Trainer.train_step) -> Any:
        return step(self, iter(list(islice(batches, self.num_micro_batches))))

    def seeded_score(self: Any, output: Any, batch: Any, loss: Callable = LanguageModelling.loss) -> Any:
        if output.likeliest is not None:
            (output.likeliest[batch.answers_BL] == batch.labels_BL[batch.answers_BL]).sum()
        return loss(self, output, batch)

    def seeded_forward(self: Any, x: torch.Tensor, *args: Any, forward: Callable = SSEMixer.forward, **kw: Any) -> Any:
        for fault in (read, mask, find, mix, wait, sum_on_host):
            fault(x.detach())
        return forward(self, x, *args, **kw)

    def read(x: torch.Tensor) -> None:
        float(x.sum())

    def mask(x: torch.Tensor) -> None:
        x[x > 0].sum()

    def find(x: torch.Tensor) -> None:
        x.nonzero()

    def mix(x: torch.Tensor) -> None:
        x + torch.zeros(x.shape, device="cpu")

    def wait(x: torch.Tensor) -> None:
        torch.cuda.synchronize()

    def sum_on_host(x: torch.Tensor) -> None:
        dist.all_reduce(torch.zeros(1, device="cpu"))

    def seeded_norm(*args: Any) -> Any:
        return local_multi_tensor_l2_norm(*args)

    torch.eye = seeded_eye
    clip_grads.l2_norm_impl = seeded_norm
    batch.to_device = seeded_copy
    loop.init_process_group, loop.build_model = seeded_process_group, seeded_build
    Trainer.train_step, SSEMixer.forward = seeded_step, seeded_forward
    LanguageModelling.loss = seeded_score


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
