"""The scan over chunks and its gradients, against a loop over segments."""

import pytest
import torch
from torch import Tensor

from megatron_sse.kernels.scan import apply_transition, scan_states
from megatron_sse.kernels.segments import Pieces, Segments, cut

SIZES, CHUNK_SIZE, H, K, V = (0, 9, 2, 0, 4, 13, 0), 4, 2, 3, 5


def loop(transition: Tensor, increment: Tensor, pieces: Pieces, initial: Tensor | None) -> tuple[Tensor, Tensor]:
    entering, finals, chunk = [], [], 0
    for segment, size in enumerate(SIZES):
        state = torch.zeros(H, K, V, dtype=torch.float64) if initial is None else initial[segment]
        for _ in range(0, size, CHUNK_SIZE):
            entering.append(state)
            state = apply_transition(transition[chunk], state) + increment[chunk]
            chunk += 1
        finals.append(state)
    return torch.stack(entering), torch.stack(finals)


@pytest.mark.parametrize("with_initial", [False, True])
@pytest.mark.parametrize("columns", [1, K], ids=["decay", "matrix"])
def test_scan_states(columns: int, with_initial: bool) -> None:
    offsets = torch.nn.functional.pad(torch.tensor(SIZES).cumsum(0), (1, 0))
    pieces = cut(Segments(offsets), sum(SIZES), CHUNK_SIZE)
    generator = torch.Generator().manual_seed(0)
    shapes = [(len(pieces.segment_M), H, K, columns), (len(pieces.segment_M), H, K, V), (len(SIZES), H, K, V)]
    leaves = [torch.randn(s, dtype=torch.float64, generator=generator).requires_grad_() for s in shapes]
    initial = leaves[2] if with_initial else None
    leaves = leaves if with_initial else leaves[:2]
    used = sum(-(-size // CHUNK_SIZE) for size in SIZES)

    results = []
    for scan in (scan_states, loop):
        entering, final = scan(leaves[0], leaves[1], pieces, initial)
        loss = (entering[:used] * leaves[1].detach()[:used].roll(1, -1)).sum() + (final * final).sum()
        results.append((entering[:used], final, *torch.autograd.grad(loss, leaves)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)
