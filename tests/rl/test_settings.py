"""Settings of rl: each contradiction is named, what is ignored is said, and reference.yaml has every key."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_sse.config import ignored_settings
from megatron_sse.config.load import make_config
from megatron_sse.config.rl import RLConfig
from megatron_sse.errors import UserError
from tests.rl.support import policy_config

REFERENCE = Path(__file__).resolve().parents[2] / "configs" / "reference.yaml"
WRONG: dict[str, tuple[str, Any]] = {
    "parallel.pipeline: got 3, allowed 1 with rl: answers are generated without pipeline stages": (
        "parallel.pipeline",
        3,
    ),
    "data.train: got 'some', allowed null with rl: rl.prompts and": ("data.train", "some"),
    "data.validation_share: got 0.1, allowed 0.0 with rl": ("data.validation_share", 0.1),
    "data.reset_at_documents: got false, allowed true with rl": ("data.reset_at_documents", False),
    "rl.max_new_tokens: got 32, allowed less than data.sequence_length 32": ("rl.max_new_tokens", 32),
    "rl.kl: got 0.1, allowed 0.0 while checkpoint.load_weights, which is the reference, is null": ("rl.kl", 0.1),
    "training.global_batch_size: got 5, allowed null with rl": ("training.global_batch_size", 5),
    "stages: got a list, allowed null with rl": ("stages", [{"tokens": 9, "sequence_length": 8}]),
    "model.transformer.attention_dropout: got 0.1, allowed 0.0 with rl": (
        "model.transformer",
        {"attention_dropout": 0.1},
    ),
    "rl.overlong_buffer: got 9, allowed at most rl.max_new_tokens 8": ("rl.overlong_buffer", 9),
    "rl.group_size: got 1, allowed at least 2": ("rl.group_size", 1),
    "rl.clip: got 1.0, allowed less than 1": ("rl.clip", 1.0),
    "rl.top_p: got 0.0, allowed more than 0": ("rl.top_p", 0.0),
    "rl.algorithm: got 'ppo', allowed 'grpo', 'dr_grpo', 'dapo' or 'gspo'": ("rl.algorithm", "ppo"),
    "rl.reward.0.function: got 'best', allowed exact, math or module:function": ("rl.reward", "best"),
    "rl.reward: got [], allowed a reward or a list of": ("rl.reward", []),
    "rl.lag: got an unknown key, allowed prompts, validation_prompts,": ("rl.lag", 1),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong(message: str, tmp_path: Path) -> None:
    values = policy_config(tmp_path).model_dump()
    values["training"]["global_batch_size"] = None
    key, value = WRONG[message]
    section, _, name = key.partition(".")
    values[section] = values[section] | {name: value} if name else value
    with pytest.raises(UserError) as error:
        make_config(values, {"": "run.yaml"})
    assert str(error.value).startswith(f"run.yaml: {message}"), error.value


def test_balance_loss_and_ignored(tmp_path: Path) -> None:
    model = policy_config(tmp_path).model.model_dump()
    model["sse"]["balance_loss"] = 0.0
    with pytest.raises(ValueError, match="rl.balance_loss: got 0.1, allowed 0.0 while model.sse.balance_loss is 0.0"):
        policy_config(tmp_path, model=model, rl={"balance_loss": 0.1})
    with pytest.raises(ValueError, match="rl.share_prefixes: got true, allowed false while parallel.context is 2"):
        policy_config(tmp_path, parallel={"context": 2}, rl={"share_prefixes": True})
    config = policy_config(tmp_path, data={"packing": "best_fit"}, training={"validation_interval": 2})
    assert ignored_settings(config) == [
        "data.packing is ignored: rl packs complete answers by best fit",
        "training.validation_interval is ignored: rl.validation_prompts is null",
    ]
    [clipped] = ignored_settings(policy_config(tmp_path, rl={"clip_high": 0.3}))
    assert clipped == "rl.clip_high is ignored: rl.updates_per_batch is 1, where all ratios are 1"
    assert not ignored_settings(policy_config(tmp_path, rl={"clip_high": 0.3, "updates_per_batch": 2}))
    assert config.training.global_batch_size == 12
    assert type(config).model_validate(yaml.safe_load(config.to_yaml())) == config


def test_reference_has_every_key() -> None:
    # The section ends with a blank line.
    text = REFERENCE.read_text().partition("\nrl:")[2].partition("\n\n")[0]
    for name, field in RLConfig.model_fields.items():
        [line] = [line for line in text.splitlines() if line.strip().startswith(f"# {name}: ")]
        default = str(field.default).lower() if isinstance(field.default, bool) else field.default
        default = "exact" if name == "reward" else "null" if default is None else default
        end = "; required" if field.is_required() else f"; default {default}"
        # A meaning may go on in the next line.
        following = text[text.index(line) :].splitlines()[:2]
        assert any(part.endswith(end) for part in following), (name, end)
