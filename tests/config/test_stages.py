"""Length stages: the settings of each, and what is refused."""

from pathlib import Path

import pytest

from megatron_sse.config import RunConfig, load_config, longest_stage, plan_stages, stage_of_step
from megatron_sse.config.derive import describe_run
from megatron_sse.errors import UserError

REFERENCE = Path(__file__).resolve().parents[2] / "configs" / "reference.yaml"
EMPTY = ["data.sequence_length=null", "training.steps=null"]
STAGES = (
    "stages=[{tokens: 40000, sequence_length: 256}, {tokens: 16384, sequence_length: 1024, rotary_base: 5e4, "
    "train: [{prefix: long, weight: 2.0}], global_batch_size: 2, learning_rate: 1e-4, schedule: wsd}]"
)


def test_stages_make_settings_of_their_own():
    config = load_config(REFERENCE, [*EMPTY, STAGES, "optimizer.min_learning_rate=1e-5"])
    # 40,000 tokens make 39.06 steps of 4 x 256.
    assert (config.training.steps, config.data.sequence_length) == (40 + 8, 1024)
    first, second = plan_stages(config)
    assert (first.steps, first.first_step, first.end, first.first_sample) == (40, 0, 40, 0)
    assert (second.steps, second.first_step, second.end, second.first_sample) == (8, 40, 48, 160)
    assert first.config.model_dump() == config.model_dump() | {
        "data": config.data.model_dump() | {"sequence_length": 256},
        "stages": None,
    }
    own = second.config
    assert own.data.train[0].prefix == "long" and second.train_key == "stages.1.train"
    assert own.model.softmax.rotary_base == 5e4 and own.training.global_batch_size == 2
    assert (own.optimizer.learning_rate, own.optimizer.decay_steps, own.training.steps) == (1e-4, 1, 48)
    assert not first.own_schedule and second.own_schedule
    assert [stage_of_step([first, second], step).number for step in (1, 40, 41, 48, 49)] == [0, 0, 1, 1, 1]
    assert longest_stage(config) == second
    assert RunConfig.model_validate(config.model_dump()) == config


def test_without_stages_the_run_is_one():
    config = load_config(REFERENCE)
    (only,) = plan_stages(config)
    assert only.config is config and (only.steps, only.end, only.train_key) == (20, 20, "data.train")


def test_one_layout_for_all_stages():
    """The layout that suits the longest sequences holds for all stages, since the model is built once."""
    settings = ["parallel.context=2", "data.reset_at_documents=false", "model.layers=sse, 5*softmax"]
    config = load_config(REFERENCE, [*EMPTY, STAGES.replace("1024", "65536"), *settings])
    assert [stage.config.parallel.layout for stage in plan_stages(config)] == ["zigzag", "zigzag"]


def test_the_description_lists_the_stages():
    lines = describe_run(load_config(REFERENCE, [*EMPTY, STAGES]), 1)
    assert "stage 2 of 2      steps 41 to 48" in lines
    assert "  total tokens      16,384 in 8 steps" in lines


ONE = "{tokens: 1000, sequence_length: 256"
WRONG = {
    "data.sequence_length: got nothing, allowed a value": EMPTY[:1],
    "training.steps: got nothing, allowed a value": EMPTY[1:],
    "training.steps: got 20, allowed null with stages, which make it 1": [EMPTY[0], f"stages=[{ONE}}}]"],
    "stages: got an empty list": [*EMPTY, "stages=[]"],
    "stages: got 3, allowed a list": [*EMPTY, "stages=3"],
    "stages.0.tokens: got nothing": [*EMPTY, "stages=[{sequence_length: 256}]"],
    "stages.0.lengt: got an unknown key": [*EMPTY, f"stages=[{ONE}, lengt: 3}}]"],
    "stages.1.schedule: got 'wsd', allowed null without stages.1.learning_rate": [
        *EMPTY,
        f"stages=[{ONE}}}, {ONE}, schedule: wsd}}]",
    ],
    "stages.0.rotary_base: got 10.0, allowed null while": [
        *EMPTY,
        f"stages=[{ONE}, rotary_base: 10.0}}]",
        "model.softmax.rotary_base=0.0",
    ],
    "stages.1: data.sequence_length: got 257, allowed a multiple of 2": [
        *EMPTY,
        f"stages=[{ONE}}}, {{tokens: 1, sequence_length: 257}}, {{tokens: 1, sequence_length: 512}}]",
        "parallel.context=2",
    ],
    "stages.0.global_batch_size: got 3, allowed a multiple of 2": [
        *EMPTY,
        f"stages=[{ONE}, global_batch_size: 3, micro_batch_size: 2}}]",
    ],
    "data.train: got [], allowed a prefix or a list": ["data.train=[]"],
    "data.train.0.weight: got -1.0, allowed more than 0": [
        "data.train=[{prefix: a, weight: -1.0}]",
    ],
    "data.train: got '2 token files', allowed one with data.corpus": ["data.train=[{prefix: a}, {prefix: b}]"],
    "data.validation_share: got 0.1, allowed 0.0 where": ["data.validation_share=0.1"],
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_settings_are_named(message):
    with pytest.raises(UserError) as caught:
        load_config(REFERENCE, WRONG[message])
    assert f": {message}" in str(caught.value) and "\n" not in str(caught.value)


def test_a_wrong_entry_of_a_list_is_found_in_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    text = REFERENCE.read_text().replace("stages: null ", "stages:\n  - tokens: 3\n    sequence_length: x\n#")
    path.write_text(text)
    line = next(number for number, part in enumerate(text.splitlines(), 1) if part.strip() == "sequence_length: x")
    with pytest.raises(UserError, match=rf"run\.yaml:{line}: stages\.0\.sequence_length: got 'x', allowed an integer"):
        load_config(path)
