"""`import megatron_sse`: the snippets of docs/python.md and docs/generate.md run, and give what the pages say."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import megatron_sse
from megatron_sse import api
from megatron_sse.cli import main
from megatron_sse.errors import UserError
from megatron_sse.parallel.groups import destroy_groups
from megatron_sse.pretrained.logits import compute_logits
from megatron_sse.pretrained.open import open_model
from tests.data.files import random_documents, write_tokens

DOCS = Path(__file__).resolve().parents[1] / "docs"
# In place of the quickstart's, in one process.
SMALL = ["model.num_layers=2", "model.layers=sse, softmax", "model.hidden_size=32", "model.sse.num_heads=2"]
SMALL += ["model.sse.head_dim=8", "model.softmax.num_heads=2", "data.sequence_length=64", "parallel.context=1"]
SMALL += ["data.corpus=null", "data.train=tokens", "data.validation=tokens", "optimizer.warmup_steps=1"]


def snippets(page: str) -> list[str]:
    """Return the Python code of a page."""
    return re.findall(r"^```python\n(.*?)^```$", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Run all snippets in one folder, with a small model of three steps; yield their names."""
    folder = tmp_path_factory.mktemp("notebook")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_tokens("tokens", random_documents(20, 200))
        assert main(["init", "quickstart"]) == 0
        names: dict[str, Any] = {"folder": folder}
        small = str([*SMALL, "training.steps=3"])
        for code in snippets("python.md"):
            exec(code.replace('["training.steps=100"]', small), names)
        for code in snippets("generate.md"):
            exec(code, {})
        yield names
        if dist.is_initialized():
            destroy_groups()
            dist.destroy_process_group()


def test_plan_and_train(said: dict[str, Any]) -> None:
    plan, run = said["plan"], said["run"]
    assert plan.fits and 0 < plan.peak_bytes < plan.gpu.memory and plan.step_seconds > 0
    assert "parameters" in str(plan) and "fits" in str(plan)
    assert run.checkpoint == Path("runs/quickstart/checkpoints/iter_0000003") and run.checkpoint.is_dir()
    assert [line["step"] for line in run.metrics()] == [1, 2, 3] and len(said["losses"]) == 3


def test_a_loaded_model(said: dict[str, Any]) -> None:
    model = said["model"]
    assert said["tokens"] == list(b"import os") and len(said["texts"]) == 2
    assert model.generate("import ", max_tokens=20) == [said["text"]] == model.generate(["import "], max_tokens=20)
    assert [layer.kind for layer in model.states("import os")] == ["sse", "softmax"]
    with pytest.raises(UserError, match=r"^prompt 1: got 107 tokens in all, allowed 64, the length"):
        model.generate("import ")
    assert len(model.generate("import ", max_tokens=60, any_length=True)) == 1
    with pytest.raises(UserError, match=r"^tokens: got token 257, allowed 0 to 256"):
        model.logits([257])


def test_logits_are_those_of_a_pass_without_a_cache(said: dict[str, Any]) -> None:
    # It makes groups of its own, and the model above cannot be used afterwards.
    destroy_groups()
    dist.destroy_process_group()
    tokens = torch.tensor([said["tokens"]])
    expected = compute_logits(open_model("path", said["folder"] / said["run"].checkpoint), tokens)[0]
    assert said["logits"].shape == (9, 257) and (said["logits"] - expected).abs().max() < 1e-4


@pytest.mark.parametrize(("status", "kind"), [(2, UserError), (1, RuntimeError)])
def test_train_tells_why_it_ended(status: int, kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    config = megatron_sse.load_config(DOCS.parent / "configs" / "quickstart.yaml")
    code = f"import sys; print('first'); sys.exit('the reason') if {status} == 1 else print('the reason'); sys.exit(2)"
    monkeypatch.setattr(api, "_command", lambda file: [sys.executable, "-c", code])
    with pytest.raises(kind, match=r"^(the run ended with exit status 1: )?the reason$"):
        megatron_sse.train(config)


def test_the_import_is_light() -> None:
    code = "import sys, megatron_sse; print({'torch', 'megatron', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
    assert all(hasattr(megatron_sse, name) for name in megatron_sse.__all__)
    assert not hasattr(megatron_sse, "none")
