"""Nothing in kernels/, parallel/ and model/ makes a tensor on the host: on a GPU the layer would wait for its copy.

A factory of torch names its device, or makes a parameter, which build_model places.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("kernels", "parallel", "megatron_sse/model")
FACTORIES = {
    *("arange", "as_tensor", "empty", "eye", "from_numpy", "full", "linspace", "logspace", "normal", "ones", "rand"),
    *("randint", "randn", "randperm", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros"),
}
# Functions that are meant to make tensors on the host.
ON_THE_HOST = {
    "kernels/scan.py": {"_waves"},  # its numpy arrays are there on a CPU only
    "parallel/device.py": {"to_device"},
    "megatron_sse/model/features.py": {"constant_decay"},  # a buffer, made with the module
}


def births(source: str, exempt: frozenset[str] = frozenset()) -> Iterator[str]:
    """Yield line and name of every factory of torch without a device, outside of torch.nn.Parameter(...)."""

    def visit(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.FunctionDef) and node.name in exempt:
            return
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name == "torch.nn.Parameter":
                return
            if name.removeprefix("torch.") in FACTORIES and name.startswith("torch."):
                if "device" not in {keyword.arg for keyword in node.keywords}:
                    yield f"{node.lineno}: {name}"
        for child in ast.iter_child_nodes(node):
            yield from visit(child)

    yield from visit(ast.parse(source))


def test_every_tensor_is_born_on_its_device() -> None:
    found = []
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = str(path.relative_to(ROOT))
            found += [f"{name}:{birth}" for birth in births(path.read_text(), frozenset(ON_THE_HOST.get(name, ())))]
    assert not found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("identity = torch.eye(n).to(x)", ["1: torch.eye"]),
        ("x = 1\nscale = torch.tensor(2.0, dtype=x.dtype)", ["2: torch.tensor"]),
        ("identity = torch.eye(n, device=x.device)", []),
        ("weight = torch.nn.Parameter(torch.empty(2))", []),
        ("zeros = x.new_zeros(2)", []),
        ("y = torch.zeros_like(x)", []),
        ("def made_on_host():\n    return torch.ones(2)", []),
    ],
)
def test_what_is_found(source: str, found: list[str]) -> None:
    assert list(births(source, frozenset({"made_on_host"}))) == found
