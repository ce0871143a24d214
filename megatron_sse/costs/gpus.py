"""NVIDIA GPUs: their peak speeds and memory, from the data sheets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """A GPU's ceilings.

    flops: dense bf16 operations per second. bandwidth: of the memory, bytes per second. memory: bytes.
    link, network: bytes per second and direction to GPUs of the same machine and of others.
    """

    name: str
    flops: float
    bandwidth: float
    memory: float
    link: float
    network: float


# GPUs of a DGX system of any of these.
GPUS_PER_NODE = 8
# From NVIDIA's data sheets of each GPU (dense bf16, one direction of NVLink) and DGX systems (network per GPU).
GPUS = {
    "a100": Gpu("A100 SXM 80 GB", 312e12, 2.039e12, 80e9, 300e9, 25e9),
    "h100": Gpu("H100 SXM", 989e12, 3.35e12, 80e9, 450e9, 50e9),
    "h200": Gpu("H200 SXM", 989e12, 4.8e12, 141e9, 450e9, 50e9),
    "b200": Gpu("B200", 2250e12, 8e12, 180e9, 900e9, 50e9),
}
# Slower variants, by a part of the name that CUDA reports ("NVIDIA H100 PCIe"): operations per second as above.
_VARIANTS = {"H100 PCIe": 756e12, "H100 NVL": 835e12}


def peak_flops(device_name: str) -> float | None:
    """Return the dense bf16 operations per second of a GPU by the name that CUDA reports; None where it is not known.

    Variants come first: "NVIDIA H100 PCIe" also contains "H100".
    """
    peaks = _VARIANTS | {key.upper(): gpu.flops for key, gpu in GPUS.items()}
    return next((peak for name, peak in peaks.items() if name in device_name), None)
