"""Compiles every Triton kernel, without a GPU, and tabulates registers, spills and shared memory.

python -m megatron_sse.tools.compile_kernels [--arch 80,90,100] [--dtype bf16,fp32] [--dim 64,128,256] [--output X]
"""

import argparse
import importlib
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

ARCHITECTURES = (80, 90, 100)


@dataclass(frozen=True)
class Compiled:
    """The assembler's numbers for one kernel; spilled: bytes of stack and local memory."""

    kernel: str
    case: str
    arch: int
    num_warps: int
    registers: int
    spilled: int
    shared: int

    @property
    def fits(self) -> bool:
        from megatron_sse.kernels.triton.target import SHARED_LIMIT

        return self.shared <= SHARED_LIMIT[self.arch]


def find_cases(arch: int) -> list[tuple[str, int, str]]:
    """Return module, index into its compile_cases(arch) and description of every case."""
    from megatron_sse.kernels import triton as room

    cases = []
    for info in pkgutil.iter_modules(room.__path__):
        module = importlib.import_module(f"{room.__name__}.{info.name}")
        if hasattr(module, "compile_cases"):
            described = (describe(*case[1:3]) for case in module.compile_cases(arch))
            cases += [(module.__name__, i, text) for i, text in enumerate(described)]
    return cases


def describe(signature: dict[str, str], constants: dict[str, object]) -> str:
    """Return a case's description: the dtype of its pointers and its constants."""
    dtypes = sorted({kind[1:] for kind in signature.values() if kind in ("*bf16", "*fp16", "*fp32")})
    dtype = next((name for name in dtypes if name != "fp32"), "fp32")
    return " ".join([dtype, *(f"{name}={value}" for name, value in constants.items())])


def compile_case(module: str, index: int, arch: int) -> Compiled:
    """Compile one case for one architecture; Triton caches what it has compiled."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, signature, constants, options = importlib.import_module(module).compile_cases(arch)[index]
    kinds = {name: "constexpr" if name in constants else signature[name] for name in kernel.arg_names}
    # A launch specialises on alignment, and torch's allocations are aligned: tell the compiler the same.
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(kinds.values()) if kind.startswith("*")}
    source = ASTSource(fn=kernel, signature=kinds, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers, spilled = _resource_usage(compiled.asm["cubin"])
    case = describe(signature, constants)
    return Compiled(
        kernel.__name__, case, arch, compiled.metadata.num_warps, registers, spilled, compiled.metadata.shared
    )


def _resource_usage(cubin: bytes) -> tuple[int, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def compile_all(architectures: list[int], keep) -> list[Compiled]:
    """Compile, on all cores, every case whose description `keep` accepts."""
    jobs = [(module, index, arch) for arch in architectures for module, index, case in find_cases(arch) if keep(case)]
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        return list(pool.map(compile_case, *zip(*jobs, strict=True)))


def table(results: list[Compiled]) -> str:
    """Return a markdown table with a row per case and architecture."""
    import triton

    lines = [
        f"Triton {triton.__version__}, assembled without a GPU; bytes of shared memory and of spilled registers.",
        "",
        "| kernel | case | sm | warps | registers | spilled | shared |",
        "|---|---|---|---|---|---|---|",
    ]
    for x in results:
        cells = (x.kernel, x.case, x.arch, x.num_warps, x.registers, x.spilled, x.shared)
        lines.append(f"| {' | '.join(map(str, cells))} |{'' if x.fits else ' does not fit'}")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="80,90,100")
    parser.add_argument("--dtype", default="bf16,fp32")
    parser.add_argument("--dim", default="64,128,256", help="head dims")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("TRITON_INTERPRET: got 1, allowed 0: interpreted kernels cannot be compiled", file=sys.stderr)
        return 2
    dtypes, dims = options.dtype.split(","), options.dim.split(",")

    def keep(case: str) -> bool:
        # Cases without a head dim, such as routing, are always kept.
        found = re.search(r"\b(?:K|V|KEY_DIM|VALUE_DIM)=(\d+)", case)
        return case.split()[0] in dtypes and (found is None or found[1] in dims)

    results = compile_all([int(arch) for arch in options.arch.split(",")], keep)
    text = table(results)
    if options.output:
        options.output.write_text(f"# Compiled kernels\n\n{text}")
    else:
        print(text)
    bad = [x for x in results if not x.fits]
    for x in bad:
        print(f"{x.kernel} {x.case} sm_{x.arch}: {x.shared} bytes of shared memory do not fit", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
