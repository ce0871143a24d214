from itertools import islice

import pytest
import torch

from megatron_sse.config import plan_stages
from megatron_sse.data.iterators import build_data_iterators
from tests.data.files import END, data_parallel_groups, random_documents, run_config, write_tokens

GLOBAL_BATCH = 8
LENGTH = 16


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    """Return a file of some 300 tokens in 18 samples: an epoch is a little more than two global batches."""
    prefix = str(tmp_path_factory.mktemp("tokens") / "train")
    write_tokens(prefix, random_documents(60, longest=11))
    return prefix


def all_tokens(prefix):
    return torch.tensor([token for document in random_documents(60, longest=11) for token in document])


def global_batches(config, size, steps, consumed=0):
    """Return tokens [steps, GLOBAL_BATCH, L] as `size` data-parallel ranks read them, in sample order."""
    micro = config.training.micro_batch_size
    rounds = GLOBAL_BATCH // (micro * size)
    by_rank = [
        list(
            islice(
                build_data_iterators(plan_stages(config)[0], data_parallel_groups(rank, size), consumed)[0],
                steps * rounds,
            )
        )
        for rank in range(size)
    ]
    rows = [by_rank[rank][index].tokens_BL for index in range(steps * rounds) for rank in range(size)]
    return torch.cat(rows).view(steps, GLOBAL_BATCH, LENGTH)


def test_order_is_the_same_at_any_data_parallel_size_and_micro_batch(prefix):
    expected = global_batches(run_config(prefix, training={"micro_batch_size": 1}), 1, 6)
    for size, micro in [(1, 2), (2, 2), (4, 1), (2, 4), (8, 1)]:
        config = run_config(prefix, training={"micro_batch_size": micro})
        assert torch.equal(global_batches(config, size, 6), expected), (size, micro)


@pytest.mark.parametrize("steps_before", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [1, 4])
def test_a_resumed_run_sees_the_samples_that_an_uninterrupted_one_sees(prefix, steps_before, size):
    config = run_config(prefix)
    whole = global_batches(config, 2, 8)
    resumed = global_batches(config, size, 8 - steps_before, consumed=steps_before * GLOBAL_BATCH)
    assert torch.equal(resumed, whole[steps_before:])


def test_resuming_with_another_global_batch_size_skips_and_repeats_nothing(prefix):
    whole = global_batches(run_config(prefix), 1, 4).flatten(0, 1)
    config = run_config(prefix, training={"global_batch_size": 2})
    resumed = list(islice(build_data_iterators(plan_stages(config)[0], data_parallel_groups(), 2 * GLOBAL_BATCH)[0], 8))
    assert torch.equal(torch.cat([batch.tokens_BL for batch in resumed]), whole[2 * GLOBAL_BATCH :])


def test_every_epoch_has_every_sample_once_in_an_order_of_its_own(prefix):
    tokens = all_tokens(prefix)
    num_samples = (len(tokens) - 1) // LENGTH
    assert num_samples % GLOBAL_BATCH, "an epoch has to end inside a global batch"
    rows = global_batches(run_config(prefix), 2, 6).flatten(0, 1)
    samples = [tuple(row) for row in tokens[: num_samples * LENGTH].view(num_samples, LENGTH).tolist()]
    epochs = [[tuple(row) for row in rows[i * num_samples : (i + 1) * num_samples].tolist()] for i in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(samples)
    assert epochs[0] != epochs[1]
    assert samples not in epochs


def test_another_seed_is_another_order(prefix):
    first = global_batches(run_config(prefix), 1, 2)
    assert not torch.equal(first, global_batches(run_config(prefix, training={"seed": 6}), 1, 2))


def validation_samples(num_tokens: int) -> list[int]:
    """Return the samples of two validation batches, which are spread evenly over the file."""
    num_samples, needed = (num_tokens - 1) // LENGTH, 2 * GLOBAL_BATCH
    samples = [number * num_samples // needed for number in range(needed)]
    assert samples[-1] > samples[0] + needed
    return samples


@pytest.mark.parametrize("reset", [True, False])
def test_labels_masks_and_documents_are_what_a_loop_over_the_file_finds(prefix, reset):
    tokens = all_tokens(prefix).tolist()
    config = run_config(prefix, data={"reset_at_documents": reset, "validation": prefix})
    config.training.validation_batches = 2
    batches = list(build_data_iterators(plan_stages(config)[0], data_parallel_groups(), 0)[1]())
    assert len(batches) == 2 * GLOBAL_BATCH // 2
    samples = iter(validation_samples(len(tokens)))
    for batch in batches:
        document = -1
        for row in range(2):
            place = next(samples) * LENGTH
            for column in range(LENGTH):
                if column == 0 or (reset and tokens[place - 1] == END):
                    document, start = document + 1, column
                assert batch.tokens_BL[row, column] == tokens[place]
                assert batch.labels_BL[row, column] == tokens[place + 1]
                assert batch.loss_mask_BL[row, column] == (0 if reset and tokens[place] == END else 1)
                assert batch.layout.document_T[row * LENGTH + column] == document
                assert batch.layout.position_BL[row, column] == column - start
                place += 1
        assert batch.layout.num_documents == document + 1
    assert batch.tokens_BL.dtype == batch.labels_BL.dtype == torch.int64
    assert batch.loss_mask_BL.dtype == torch.float32


def test_validation_is_the_same_each_time_and_at_any_data_parallel_size(prefix):
    config = run_config(prefix, data={"validation": prefix}, training={"validation_batches": 2})
    factory = build_data_iterators(plan_stages(config)[0], data_parallel_groups(), 24)[1]
    whole = torch.cat([batch.tokens_BL for batch in factory()])
    assert torch.equal(whole, torch.cat([batch.tokens_BL for batch in factory()]))
    tokens = all_tokens(prefix)
    expected = [tokens[sample * LENGTH : (sample + 1) * LENGTH] for sample in validation_samples(len(tokens))]
    assert torch.equal(whole, torch.stack(expected))
    ranks = [build_data_iterators(plan_stages(config)[0], data_parallel_groups(rank, 2), 0)[1]() for rank in range(2)]
    rows = [batch.tokens_BL for pair in zip(*ranks, strict=True) for batch in pair]
    assert torch.equal(torch.cat(rows), whole)


def test_no_validation_file_no_validation(prefix):
    assert build_data_iterators(plan_stages(run_config(prefix))[0], data_parallel_groups(), 0)[1] is None
