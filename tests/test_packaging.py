"""The wheel holds every module and every YAML file, under the names that the checkout has them under."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"megatron_sse": "megatron_sse"}
FOLDERS |= {name: f"megatron_sse/{name}" for name in ("kernels", "parallel", "tools", "configs")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Built from a copy: setuptools writes beside the sources.
    copy = tmp_path_factory.mktemp("source")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", folder, copy], check=True)
    return next(folder.glob("*.whl"))


def test_wheel_holds_all_files(wheel: Path) -> None:
    expected = {
        f"{inside}/{path.relative_to(ROOT / name)}"
        for name, inside in FOLDERS.items()
        for pattern in ("*.py", "*.yaml")
        for path in (ROOT / name).rglob(pattern)
    }
    assert expected - set(zipfile.ZipFile(wheel).namelist()) == set()


def test_wheel_and_checkout_import_alike(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "import megatron_sse.kernels, megatron_sse.parallel, megatron_sse.tools, megatron_sse.configs\n"
    code += "from megatron_sse import cli; print(megatron_sse.kernels.__file__)"
    for folder, inside in ((tmp_path, "megatron_sse/kernels"), (ROOT, "kernels")):
        run = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
        assert Path(run.stdout.strip()) == folder / inside / "__init__.py", run.stderr
