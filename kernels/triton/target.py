"""The GPU that kernels are launched on, as far as blocks and stages depend on it."""

import functools
from dataclasses import dataclass

import torch

# Bytes of shared memory that one program may have, by compute capability.
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 103: 227 << 10, 120: 99 << 10}
# What blocks and stages for large shared memory were chosen for.
_LARGE = SHARED_LIMIT[90]


@dataclass(frozen=True)
class Target:
    """arch: compute capability as a number, 90 for Hopper. shared: bytes of shared memory that a program may have."""

    arch: int
    shared: int

    @property
    def is_large(self) -> bool:
        """Whether operands of matrix products and several stages of them fit in shared memory.

        A later GPU need not have more: sm_120 has less than sm_80, and its tensor cores read from registers as those
        did.
        """
        return self.shared >= _LARGE


HOPPER = Target(90, SHARED_LIMIT[90])


@functools.cache
def target_of(device: torch.device) -> Target:
    """Return the target that `device` is; Hopper in Triton's interpreter."""
    if device.type != "cuda":
        return HOPPER
    properties = torch.cuda.get_device_properties(device)
    return Target(10 * properties.major + properties.minor, properties.shared_memory_per_block_optin)  # type: ignore[attr-defined]
