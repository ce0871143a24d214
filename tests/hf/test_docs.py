"""The commands and scripts of docs/finetune.md run, with fewer steps, on the tiny model."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch

from megatron_sse.cli import main
from megatron_sse.pretrained.logits import compute_logits
from megatron_sse.pretrained.open import open_model
from megatron_sse.pretrained.text import open_tokenizer
from tests.convert.support import random_tokens

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "finetune.md").read_text()


def test_finetuning_and_back(
    export: Path, load: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = re.findall(r"^ {4}\.venv/bin/megatron-sse (.*)$", PAGE, re.MULTILINE)
    scripts = [dedent(block) for block in re.findall(r"^ {4}from .*(?:\n(?: {4}.*)?)*", PAGE, re.MULTILINE)]
    assert len(commands) == len(scripts) == 2
    chats = [[("user", "2+2?"), ("assistant", "4")], [("user", "Hello"), ("assistant", "Hello."), ("user", "Bye")]]
    lines = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in chats]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/quickstart").symlink_to(export.parent / "ours")
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(commands[0])) == 0
    for script in scripts:
        script = re.sub(r"max_completion_length=\d+", "max_completion_length=8", script)
        exec(re.sub(r"max_steps=\d+", "max_steps=2, use_cpu=True", script), {})
    assert main(shlex.split(commands[1])) == 0

    tokens_BL = random_tokens(257)
    logits = compute_logits(open_model("", tmp_path / "back"), tokens_BL)
    with torch.no_grad():
        exported, tuned, after = (load(tmp_path / name)(tokens_BL).logits for name in ("exported", "tuned", "rewarded"))
    assert (logits - after).abs().max() < 1e-3 and (logits - exported).abs().max() > 1e-3
    # GRPO's own learning rate is small.
    assert not torch.equal(after, tuned)
    assert open_tokenizer(open_model("", tmp_path / "back")).encode("ab") == [97, 98]
    assert "assistant: " in (tmp_path / "back/chat_template.jinja").read_text()
