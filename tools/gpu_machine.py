"""Prints what a machine with a GPU has; exit status 1 where kernels cannot run."""

import platform
import shutil
import subprocess
import sys

import torch
import triton


def main() -> int:
    print(f"python {platform.python_version()}, torch {torch.__version__}, triton {triton.__version__}")
    if shutil.which("nvidia-smi"):
        print(subprocess.run(["nvidia-smi"], capture_output=True, text=True).stdout)
    # Imported here: what is missing is the answer.
    import megatron.core
    from megatron.core.extensions import transformer_engine

    print(f"megatron-core {megatron.core.__version__}, Transformer Engine: {transformer_engine.HAVE_TE}")
    if not torch.cuda.is_available():
        print("torch finds no GPU")
        return 1
    gpu = torch.cuda.get_device_properties(0)
    print(f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.multi_processor_count} multiprocessors")
    shared = gpu.shared_memory_per_block_optin  # type: ignore[attr-defined]
    print(f"{gpu.total_memory >> 20} MiB, {shared >> 10} KiB of shared memory for a block")
    return 0


if __name__ == "__main__":
    sys.exit(main())
