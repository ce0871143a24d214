"""The top-level folders have one import name: in place, in a wheel and for mypy."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("kernels", "parallel", "tools", "configs")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the sources that tests may build in and change."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("megatron_sse", *LINKED):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def build(what: str, source: Path, target: Path) -> Path:
    """Build a wheel or an sdist as pip does."""
    code = f"from setuptools.build_meta import build_{what}; build_{what}({str(target)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    return next(target.iterdir())


@pytest.fixture(scope="module")
def sdist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", checkout, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a wheel built from the sdist, which shows that the sdist is complete."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return build("wheel", next(folder.iterdir()), tmp_path_factory.mktemp("wheel"))


def sources() -> list[str]:
    """Return every module and configuration, by its place in the package."""
    places = {ROOT / "megatron_sse": "megatron_sse"} | {ROOT / name: f"megatron_sse/{name}" for name in LINKED}
    return sorted(
        f"{place}/{path.relative_to(folder)}"
        for folder, place in places.items()
        for pattern in ("*.py", "*.yaml", "*.cpp")
        for path in folder.rglob(pattern)
        if not any(parent.is_symlink() for parent in path.parents if parent.is_relative_to(ROOT))
    )


def test_wheel_and_sdist_hold_each_file_once(wheel: Path, sdist: Path) -> None:
    def is_source(name: str) -> bool:
        return name.endswith((".py", ".yaml", ".cpp"))

    assert sorted(filter(is_source, zipfile.ZipFile(wheel).namelist())) == sources()
    with tarfile.open(sdist) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    assert sorted(filter(is_source, names)) == sources()


def run_python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)


def test_wheel_and_checkout_import_alike(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "import megatron_sse.kernels, megatron_sse.parallel, megatron_sse.tools, megatron_sse.configs\n"
    code += "from megatron_sse import cli; print(megatron_sse.kernels.__file__)"
    for folder in (tmp_path, ROOT):
        done = run_python(code, folder)
        assert done.stdout.strip() == f"{folder}/megatron_sse/kernels/__init__.py", done.stderr


def test_folders_have_no_other_name(tmp_path: Path) -> None:
    """The folders cannot be imported by another name, from the checkout's folder or elsewhere."""
    for line in ("from kernels import route", "import kernels.gla", "import parallel", "import tools"):
        done = run_python(line, ROOT)
        assert "ImportError" in done.stderr or "ModuleNotFoundError" in done.stderr, line
    assert "import megatron_sse.kernels" in run_python("from kernels import route", ROOT).stderr
    done = run_python("import importlib.util as u; print([u.find_spec(n) for n in ('kernels', 'tools')])", tmp_path)
    assert str(ROOT) not in done.stdout and done.returncode == 0
    assert run_python("import megatron_sse.megatron_sse", ROOT).returncode == 1


@pytest.mark.parametrize("line", ["import kernels", "from parallel import layout", "from tests import workers"])
def test_ruff_refuses_other_names(line: str) -> None:
    command = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--select",
        "TID251",
        "--stdin-filename",
        "megatron_sse/x.py",
        "-",
    ]
    done = subprocess.run(command, cwd=ROOT, input=f"{line}\n", capture_output=True, text=True)
    assert done.returncode == 1 and "TID251" in done.stdout, done.stderr


def test_kernels_are_not_taken_for_another_package() -> None:
    done = run_python("from transformers.utils import is_kernels_available; print(is_kernels_available())", ROOT)
    assert done.stdout.strip() == "False", done.stderr


# By module: lines with one type error each, in calls between the folders.
SEEDED = {
    "megatron_sse.seeded": ["from megatron_sse.kernels import route", "route(1)"],
    "megatron_sse.model.seeded": ["from megatron_sse.parallel.sharding import ContextShard", "ContextShard('0')"],
    "megatron_sse.kernels.seeded": ["from megatron_sse.kernels.segments import Segments", "Segments(rows=3)"],
    "megatron_sse.parallel.seeded": ["from megatron_sse.kernels import Edges", "Edges(1)"],
    "megatron_sse.parallel.handoff.seeded": ["from megatron_sse.errors import UserError", "x: int = UserError('')"],
    "megatron_sse.tools.seeded": ["from megatron_sse.kernels.scan import scan_states", "scan_states()"],
}


def test_mypy_sees_errors_at_all_borders(checkout: Path, tmp_path: Path) -> None:
    for module, lines in SEEDED.items():
        (checkout / f"{module.replace('.', '/')}.py").write_text("\n".join(lines) + "\n")
    # torch's and Megatron-Core's own types take most of mypy's time and are not what is tested.
    settings = (ROOT / "setup.cfg").read_text() + "[mypy-torch.*,megatron.*]\nfollow_imports = skip\n"
    (tmp_path / "mypy.ini").write_text(settings)
    command = [sys.executable, "-m", "mypy", "--cache-dir", tmp_path, "--config-file", tmp_path / "mypy.ini"]
    for module in SEEDED:
        command += ["-m", module]
    said = subprocess.run(command, cwd=checkout, capture_output=True, text=True).stdout
    for module in SEEDED:
        (checkout / f"{module.replace('.', '/')}.py").unlink()
        assert f"{module.replace('.', '/')}.py:2: error" in said, said
