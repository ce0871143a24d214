"""The samples of a run and their order: the same in any layout, after resumes and across stages; blends; masks."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_sse.config import RunConfig, Source, plan_stages, stage_of_step
from megatron_sse.data.blend import TrainingOrder
from megatron_sse.data.iterators import build_data_iterators
from megatron_sse.data.metadata import Metadata
from megatron_sse.data.sources import open_training
from megatron_sse.errors import UserError
from tests.data.files import data_parallel_groups, run_config, write_tokens

VOCABULARY = 20_000


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory) -> list[str]:
    """Return two files in which every token occurs once, so that a token identifies its sample."""
    folder = tmp_path_factory.mktemp("tokens")
    found = []
    for number, (first, last) in enumerate([(0, 8_000), (8_000, 20_000)]):
        bounds = np.unique(np.random.default_rng(number).integers(first, last, 300))
        documents = [part.tolist() for part in np.split(np.arange(first, last), bounds - first) if len(part)]
        found.append(str(folder / f"file{number}"))
        write_tokens(found[-1], documents, dtype=np.int32)
    return found


def staged(prefixes: list[str]) -> RunConfig:
    """Return a run of 600 steps on sequences of 16 tokens, then 400 on 32, on a packed blend."""
    blend = [{"prefix": prefixes[0], "weight": 0.3}, {"prefix": prefixes[1], "weight": 0.7}]
    data = {"train": blend, "packing": "best_fit"}
    training = {"global_batch_size": 4, "micro_batch_size": 1}
    values = run_config("x", data=data, training=training, model={"vocab_size": VOCABULARY}).model_dump()
    values["stages"] = [
        {"tokens": 600 * 4 * 16, "sequence_length": 16},
        {"tokens": 400 * 4 * 32, "sequence_length": 32, "train": prefixes[1]},
    ]
    values["data"]["sequence_length"] = values["training"]["steps"] = None
    return RunConfig.model_validate(values)


def sample_ids(config: RunConfig, data_size: int, context_size: int, first_step: int = 1) -> list[tuple]:
    """Return, by step, the tokens of its samples, collected from all ranks."""
    stages, found = plan_stages(config), []
    step = first_step
    while step <= config.training.steps:
        stage = stage_of_step(stages, step)
        consumed = (step - 1 - stage.first_step) * stage.config.training.global_batch_size
        steps = stage.end - step + 1
        rounds = stage.config.training.global_batch_size // data_size
        ranks = [
            [
                islice(
                    build_data_iterators(stage, data_parallel_groups(rank, data_size, part, context_size), consumed)[0],
                    steps * rounds,
                )
                for part in range(context_size)
            ]
            for rank in range(data_size)
        ]
        for _ in range(steps):
            samples = []
            for _ in range(rounds):
                for parts in ranks:
                    tokens_E = torch.cat([next(part).tokens_BL[0] for part in parts])
                    samples.append(tuple(tokens_E.tolist()))
            found.append(tuple(samples))
        step = stage.end + 1
    return found


def test_a_thousand_steps_at_any_layout_across_a_resume_and_a_stage_change(prefixes):
    config = staged(prefixes)
    expected = sample_ids(config, 1, 1)
    assert len(expected) == 1000 and len(expected[0][0]) == 16 and len(expected[-1][0]) == 32
    assert len(set(expected)) == 1000
    for data_size in (2, 4):
        assert sample_ids(config, data_size, 1) == expected
    halves = RunConfig.model_validate(config.model_dump() | {"parallel": {"context": 2}})
    assert sample_ids(halves, 1, 2) == expected
    for first_step in (301, 600, 601, 602):
        assert sample_ids(config, 2, 1, first_step) == expected[first_step - 1 :]


def test_a_blend_keeps_its_weights_from_the_start_and_repeats_the_smaller_file(prefixes):
    blend = [Source(prefix=prefixes[0], weight=3.0), Source(prefix=prefixes[1], weight=1.0)]
    config = run_config("x", data={"train": [source.model_dump() for source in blend]}, model={"vocab_size": 20_000})
    stage = plan_stages(config)[0]
    order = TrainingOrder(open_training(stage), [1, 0])
    from_first = np.array([order[position].tokens_E1[0] < 8_000 for position in range(2_000)])
    counts = np.cumsum(from_first)
    assert np.abs(counts - 0.75 * np.arange(1, 2_001)).max() <= 1
    # 1,500 samples from a file of 499: each occurs three times, once before any occurs again.
    firsts = [order[position].tokens_E1[0] for position in np.flatnonzero(from_first)[:499]]
    assert len(set(firsts)) == 499
    longer = TrainingOrder(open_training(stage), [1, 0])
    assert np.array_equal(longer[1_999].tokens_E1, order[1_999].tokens_E1)


def test_the_loss_mask_and_padding_leave_labels_out(tmp_path):
    prefix = str(tmp_path / "chat")
    documents = [[1, 2, 3, 4, 5], [6, 7, 8], [9, 10, 11, 12]]
    write_tokens(prefix, documents)
    mask = [0, 0, 1, 1, 1, 0, 1, 1, 1, 0, 0, 1]
    Path(prefix + ".mask").write_bytes(bytes(mask))
    Metadata("bytes", 64, 3, 12, 12, 1.0, loss_mask=True).write(Path(prefix + ".json"))
    sections = {"training": {"global_batch_size": 1, "micro_batch_size": 1}}
    config = run_config(prefix, data={"packing": "best_fit"}, **sections)
    batch = next(build_data_iterators(plan_stages(config)[0], data_parallel_groups(), 0)[0])
    counted = {int(label) for label in batch.labels_BL[batch.loss_mask_BL > 0]}
    assert counted == {3, 4, 5, 7, 8, 12} and batch.loss_tokens == 6
    real = batch.layout.real_BL[0].tolist()
    assert real == [True] * 12 + [False] * 4
    # Padding is a separate document.
    assert batch.layout.num_documents == 4
    Path(prefix + ".mask").write_bytes(bytes(mask[:-1]))
    with pytest.raises(UserError, match=r"chat\.mask: .* 12 bytes"):
        open_training(plan_stages(config)[0])


def test_a_share_of_the_documents_is_held_out(prefixes):
    data = {"train": prefixes[0], "validation_share": 0.25}
    training = {"validation_batches": 2, "global_batch_size": 8}
    config = run_config("x", data=data, training=training, model={"vocab_size": VOCABULARY})
    stage = plan_stages(config)[0]
    iterator, make_validation = build_data_iterators(stage, data_parallel_groups(), 0)
    trained = {int(token) for batch in islice(iterator, 4_000 // 16) for token in batch.tokens_BL.flatten()}
    held_out = {int(token) for batch in make_validation() for token in batch.tokens_BL.flatten()}
    border = max(trained) + 1
    assert min(held_out) >= border and 5_950 < border < 6_150
    one = run_config("x", data={"train": prefixes[0], "validation_share": 0.0001}, model={"vocab_size": VOCABULARY})
    with pytest.raises(UserError, match=r"data\.validation_share: 0\.0001 of .* one side"):
        open_training(plan_stages(one)[0])


def test_a_file_of_a_blend_that_is_wrong_is_named(prefixes, tmp_path):
    blend = [{"prefix": prefixes[0]}, {"prefix": str(tmp_path / "none")}]
    config = run_config("x", data={"train": blend}, model={"vocab_size": VOCABULARY})
    with pytest.raises(UserError, match=r"data\.train\.1\.prefix: .*none\.idx not found"):
        open_training(plan_stages(config)[0])
