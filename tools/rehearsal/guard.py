"""Building and loading guard.cpp, once per version of torch. Nothing here imports torch."""

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from megatron_sse.errors import UserError

SOURCE = Path(__file__).with_name("guard.cpp")
COMPILER = "g++"


def load_guard() -> None:
    """Load the device guard into this process, compiled into the cache folder the first time. Raises UserError.

    Call it before torch is imported: torch asks once whether there is a GPU.
    """
    assert "torch" not in sys.modules
    found = importlib.util.find_spec("torch")
    assert found is not None and found.origin is not None
    root = Path(found.origin).parent
    if (root / "lib" / "libtorch_cuda.so").exists():
        raise UserError(
            f"torch: got {version('torch')}, allowed a CPU build such as {version('torch').split('+')[0]}+cpu: the "
            "rehearsal stands in for the GPU; install one into an environment of its own"
        )
    fingerprint = hashlib.sha256(SOURCE.read_bytes() + version("torch").encode()).hexdigest()[:16]
    library = cache_folder() / f"guard_{fingerprint}.so"
    if not library.exists():
        _compile(library, root)
    ctypes.CDLL(str(library))


def cache_folder() -> Path:
    """Return the folder for what is built once per user: megatron_sse in XDG_CACHE_HOME, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron_sse"


def _compile(library: Path, torch_root: Path) -> None:
    if shutil.which(COMPILER) is None:
        raise UserError(f"{COMPILER}: not found; the rehearsal compiles {SOURCE.name} with it once (apt install g++)")
    library.parent.mkdir(parents=True, exist_ok=True)
    # Renamed when complete: two rehearsals may compile at the same time.
    unfinished = library.with_suffix(f".{os.getpid()}")
    libraries = torch_root / "lib"
    command = [COMPILER, "-shared", "-fPIC", "-O0", "-std=c++20", f"-I{torch_root}/include", str(SOURCE)]
    command += ["-o", str(unfinished), f"-L{libraries}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{libraries}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        lines = done.stderr.splitlines() or ["no message"]
        error = next((line for line in lines if "error:" in line), lines[-1])
        raise UserError(f"{SOURCE.name}: does not compile with torch {version('torch')}: {error}")
    unfinished.replace(library)
