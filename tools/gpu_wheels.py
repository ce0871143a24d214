"""Packages for a machine with a GPU that has torch and Triton but no network (Linux on x86-64, Python 3.11 or 3.12).

    python tools/gpu_wheels.py --download          # here: puts wheels of the pinned versions into .whl/
    python tools/gpu_wheels.py --install FOLDER    # there: unpacks into FOLDER those that the machine lacks

Only Python's own library is used. flash-linear-attention is for comparisons of speed.
"""

import argparse
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WHEELS = ROOT / ".whl"
PYTHONS = ("3.11", "3.12")
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (34, 31, 28, 27, 24, 17)] + ["manylinux2014_x86_64"]
# What the package and its tests import, and what these import.
PACKAGES = (
    *("megatron-core", "numpy", "einops", "psutil", "packaging", "PyYAML", "pytest", "pluggy", "iniconfig", "Pygments"),
    *("pydantic", "pydantic-core", "annotated-types", "typing-extensions", "typing-inspection"),
    *("tensorboard", "tensorboard-data-server", "absl-py", "grpcio", "markdown", "protobuf", "werkzeug", "MarkupSafe"),
    *("pillow", "six", "flash-linear-attention", "fla-core"),
)


def download() -> int:
    """Put the wheels of all packages for all Pythons into .whl/."""
    pinned = read_pins((ROOT / "constraints.txt").read_text())
    WHEELS.mkdir(exist_ok=True)
    for python in PYTHONS:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--python-version", python, "--implementation", "cp", "--dest", str(WHEELS)]
        command += [part for platform in PLATFORMS for part in ("--platform", platform)]
        versions = {name: pinned.get((normalize(name), python)) for name in PACKAGES}
        command += [f"{name}=={version}" if version else name for name, version in versions.items()]
        subprocess.run(command, check=True)
    print(f"{WHEELS}: {sum(path.stat().st_size for path in WHEELS.glob('*.whl')) >> 20} MiB")
    return 0


def read_pins(text: str) -> dict[tuple[str, str], str]:
    """Return the pinned version of each package for each Python; of markers, those of python_version are read."""
    pins = {}
    for line in text.splitlines():
        match = re.match(r"([\w.-]+)==([^\s;]+)(?:\s*;\s*python_version\s*(<|>=)\s*[\"']3\.(\d+)[\"'])?\s*$", line)
        if match is None:
            continue
        name, version, operator, minor = match.groups()
        for python in PYTHONS:
            own = int(python.split(".")[1])
            if operator is None or (own < int(minor)) == (operator == "<"):
                pins[normalize(name), python] = version
    return pins


def normalize(name: str) -> str:
    """Return a package's name as pip compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def is_missing(name: str) -> bool:
    """Check whether a package is not installed."""
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return True
    return False


def install(folder: Path) -> int:
    """Unpack into `folder` the packages that this machine lacks; status 1 where some have no wheel for its Python."""
    missing = [name for name in PACKAGES if is_missing(name)]
    print(f"missing: {', '.join(missing) or 'nothing'}")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    command += ["--find-links", str(WHEELS), "--target", str(folder)]
    # One by one: what has no wheel keeps out no other.
    unmet = [name for name in missing if subprocess.run([*command, name]).returncode != 0]
    if unmet:
        print(f"no wheel for this Python in {WHEELS}: {', '.join(unmet)}")
    return 1 if unmet else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--download", action="store_true")
    what.add_argument("--install", type=Path, metavar="FOLDER")
    options = parser.parse_args()
    return download() if options.download else install(options.install)


if __name__ == "__main__":
    sys.exit(main())
