"""An exported model is trained by transformers, PEFT and TRL, with the losses that its logits have, and comes back."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from megatron_sse.pretrained.logits import compute_logits
from megatron_sse.pretrained.open import open_model
from tests.convert.support import convert, random_tokens

TEXTS = ["The quick brown fox", "jumps", "over the lazy dog", "and then some"]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}:{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture
def common(tmp_path: Path) -> dict[str, Any]:
    """Arguments of every trainer: two steps in fp32 on the CPU."""
    return {
        "output_dir": str(tmp_path / "output"),
        "max_steps": 2,
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
    }


@pytest.fixture(scope="module")
def tokenizer(export: Path) -> Any:
    return transformers.PreTrainedTokenizerFast.from_pretrained(export)


def losses(trainer: Any) -> list[float]:
    trainer.train()
    return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


def mean_loss(network: Any, rows: list[tuple[str, str]]) -> float:
    """Return the mean loss over the tokens of the second text of each row, each row computed alone."""
    total, count = torch.zeros(()), 0
    for given, wanted in rows:
        tokens = torch.tensor([*given.encode(), *wanted.encode(), 256])[None]
        with torch.no_grad():
            logits: Tensor = network(tokens).logits
        first = max(len(given.encode()), 1)
        total += cross_entropy(logits[0, first - 1 : -1], tokens[0, first:], reduction="sum")
        count += tokens.shape[1] - first
    return (total / count).item()


def test_accumulated_micro_batches_are_one_batch(load: Callable[..., Any], common: dict[str, Any]) -> None:
    rows = [{"input_ids": random_tokens(257, length)[0]} for length in (60, 10, 30, 4)]

    def collate(batch: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        tokens = torch.nn.utils.rnn.pad_sequence(
            [row["input_ids"] for row in batch], batch_first=True, padding_value=-1
        )
        real = tokens >= 0
        return {"input_ids": tokens * real, "attention_mask": real, "labels": tokens.masked_fill(~real, -100)}

    def step(batch: int, accumulate: int) -> list[float]:
        arguments = common | {"max_steps": 1, "per_device_train_batch_size": batch, "remove_unused_columns": False}
        settings = TrainingArguments(**arguments, gradient_accumulation_steps=accumulate, max_grad_norm=1e9)
        trainer = Trainer(load(), settings, train_dataset=rows, data_collator=collate)
        trainer.train()
        [entry] = [entry for entry in trainer.state.log_history if "loss" in entry]
        return [float(entry["loss"]), float(entry["grad_norm"])]

    one, four = step(4, 1), step(1, 4)
    assert four == pytest.approx(one, rel=1e-3) and one[0] > 4


@pytest.mark.parametrize("packing", [False, True])
def test_sft(
    load: Callable[..., Any], network: Any, tokenizer: Any, common: dict[str, Any], tmp_path: Path, packing: bool
) -> None:
    """Packed or padded, the loss is that of the texts alone; what was trained comes back as a checkpoint."""
    packed = {"packing": True, "per_device_train_batch_size": 1} if packing else {}
    settings = SFTConfig(**common | packed, max_length=64)
    texts = Dataset.from_dict({"text": TEXTS})
    trainer = SFTTrainer(load(), settings, train_dataset=texts, processing_class=tokenizer)
    first, second = losses(trainer)
    assert first == pytest.approx(mean_loss(network, [("", text) for text in TEXTS]), rel=1e-3)
    assert second < first - 0.2
    if packing:
        trainer.save_model(str(tmp_path / "tuned"))
        assert convert(str(tmp_path / "tuned"), str(tmp_path / "ours")) == 0
        tokens_BL = random_tokens(257)
        with torch.no_grad():
            expected = trainer.model.eval()(tokens_BL).logits
        assert (compute_logits(open_model("", tmp_path / "ours"), tokens_BL) - expected).abs().max() < 1e-3
        assert (network(tokens_BL).logits - expected).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_sft_of_answers_with_lora(
    load: Callable[..., Any], network: Any, tokenizer: Any, common: dict[str, Any], kind: str
) -> None:
    pairs = [("2+2?", "4"), ("What is this?", "A test.")]
    if kind == "chat":
        rows = [
            {"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": tell}]}
            for ask, tell in pairs
        ]
        options = {"assistant_only_loss": True}
        pairs = [(f"user:{ask}assistant:", tell) for ask, tell in pairs]
    else:
        rows = [{"prompt": ask, "completion": tell} for ask, tell in pairs]
        options = {"completion_only_loss": True}
    tokenizer.chat_template = TEMPLATE if kind == "chat" else None
    model = load()
    trainer = SFTTrainer(
        model,
        SFTConfig(**common | options),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4),
    )
    first, second = losses(trainer)
    assert first == pytest.approx(mean_loss(network, pairs), rel=1e-3)
    assert second < first
    trained = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert all("lora_" in name for name in trained) and any("e_proj" in name for name in trained)
    # All adapters are used, the router's too.
    changed = {name for name, parameter in trainer.model.named_parameters() if "lora_B" in name and parameter.any()}
    assert changed == {name for name in trained if "lora_B" in name}
    with torch.no_grad():
        expected = trainer.model.eval()(random_tokens(257)).logits
        merged = trainer.model.merge_and_unload()
        assert (merged(random_tokens(257)).logits - expected).abs().max() < 1e-3
    assert merged.state_dict().keys() == network.state_dict().keys()


def test_dpo(load: Callable[..., Any], tokenizer: Any, common: dict[str, Any]) -> None:
    rows = [{"prompt": "2+2=", "chosen": "4", "rejected": "five"}, {"prompt": "a", "chosen": "b", "rejected": "x"}]
    settings = DPOConfig(**common)
    trainer = DPOTrainer(load(), load(), settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    first, second = losses(trainer)
    # Model and reference are the same at first.
    assert first == pytest.approx(math.log(2), rel=1e-4) and second < first - 0.01
