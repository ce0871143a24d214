"""The monitor on one process and on several, its events read back."""

import logging
import math
from pathlib import Path

import pytest
import torch

from megatron_sse.config import Source, load_config
from megatron_sse.costs.flops import train_flops_per_token
from megatron_sse.data.metadata import BytesOfTokens, Metadata
from megatron_sse.model import build_model
from megatron_sse.monitor.health import find_mixers
from megatron_sse.monitor.monitor import Monitor, bytes_of_validation
from megatron_sse.parallel.device import setup_device
from megatron_sse.parallel.groups import init_groups
from tests.data.files import run_config
from tests.monitor.events import read_events
from tests.workers import run_workers

PARTITIONS = 4
LOSSES = {"loss": 2.5, "balance_loss": 1.25}


def small_config(folder, layout=None, **monitor):
    Metadata("bytes", 257, 1, 300, 200, 4.5).write(Path(folder) / "validation.json")
    config = run_config(
        str(Path(folder) / "train"),
        model={"num_layers": 4, "layers": "2*sse, gla, softmax", "vocab_size": 257},
        data={"validation": str(Path(folder) / "validation")},
        monitor={"folder": str(Path(folder) / "run"), "health_interval": 2, **monitor},
    )
    for name, value in (layout or {}).items():
        setattr(config.parallel, name, value)
    return config


def fake_means(layer, tensor_rank, data_rank):
    """Return metrics that differ by layer and rank, so that a wrong mean is noticed."""
    rank = tensor_rank + 10 * data_rank
    means = {"decay": layer + rank, "state_norm": 2 * layer + rank}
    if layer <= 2:
        means |= {"entropy": 3 * layer + rank, "balance_loss": 4 * layer + rank}
        means["share_N"] = torch.arange(PARTITIONS) + 100.0 * layer
    return {name: torch.as_tensor(value, dtype=torch.float32) for name, value in means.items()}


def run_monitor(folder, layout=None, steps=4, log_interval=1, memory_steps=None):
    """Run the monitor for `steps` steps and return what this rank logged."""
    config = small_config(folder, layout, log_interval=log_interval, memory_steps=memory_steps)
    parallel = config.parallel
    groups = init_groups(parallel.tensor, parallel.pipeline, parallel.virtual_pipeline, parallel.context)
    device = setup_device(0)
    chunks = build_model(config, groups, device)
    for mixer in find_mixers(chunks):
        means = fake_means(mixer.layer_number, groups.tp.rank(), groups.dp.rank())
        mixer.metrics.means = lambda means=means: means
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("megatron_sse.monitor.monitor")
    logger.setLevel("INFO")
    logger.addHandler(handler)
    monitor = Monitor(config, groups, chunks, device)
    for step in range(1, steps + 1):
        monitor.step(step, LOSSES, 1e-3 * step, 0.5, tokens=1000, seconds=0.25 * step)
    monitor.validation(steps, {"loss": math.log(2)})
    monitor.validation(steps, {"loss": math.log(2), "accuracy": 0.25})
    monitor.close()
    logger.removeHandler(handler)
    return lines


LAYOUTS = {
    "one process": (1, {}),
    "TP2": (2, {"tensor": 2}),
    "PP2": (2, {"pipeline": 2}),
    "PP2 with virtual stages": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "DP2": (2, {}),
    "CP2": (2, {"context": 2}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_events_are_complete_at_any_layout(name, tmp_path):
    world_size, layout = LAYOUTS[name]
    by_rank = run_workers(world_size, run_monitor, str(tmp_path), layout)
    assert by_rank[1:] == [[]] * (world_size - 1), "only rank 0 speaks"
    scalars = read_events(tmp_path / "run")
    assert scalars["train/loss"] == [(step, 2.5) for step in range(1, 5)]
    assert scalars["train/balance_loss"][-1] == (4, 1.25)
    assert scalars["optimizer/learning_rate"] == [(step, pytest.approx(1e-3 * step)) for step in range(1, 5)]
    assert scalars["optimizer/grad_norm"][0] == (1, 0.5)
    assert scalars["speed/tokens_per_second"] == [(step, pytest.approx(4000 / step)) for step in range(1, 5)]
    assert scalars["memory/peak_gib"][0][1] > 0.1
    assert "speed/mfu" not in scalars
    assert scalars["speed/processes"][-1] == (4, world_size)
    flops = train_flops_per_token(small_config(tmp_path).model, 16) * 4000 / world_size
    assert scalars["speed/tflops_per_gpu"][0] == (1, pytest.approx(flops / 1e12))
    assert len(list((tmp_path / "run/tensorboard").iterdir())) == 1
    assert scalars["validation/loss"] == [(4, pytest.approx(math.log(2)))] * 2
    assert scalars["validation/bits_per_byte"] == [(4, pytest.approx(1.5))] * 2
    assert scalars["validation/accuracy"] == [(4, 0.25)]

    # Tensor ranks add 0 and 1, data-parallel ranks 0 and 10, which gives these means.
    offset = {"TP2": 0.5, "DP2": 5.0}.get(name, 0.0)
    for layer in (1, 2, 3):
        prefix = f"sse/layer_{layer:02d}"
        assert scalars[f"{prefix}/mean_decay"] == [(2, layer + offset), (4, layer + offset)]
        assert scalars[f"{prefix}/state_norm"][0] == (2, 2 * layer + offset)
        if layer == 3:
            continue
        assert scalars[f"{prefix}/router_entropy"][0] == (2, 3 * layer + offset)
        assert scalars[f"{prefix}/balance_loss"][0] == (2, 4 * layer + offset)
        for partition in range(PARTITIONS):
            assert scalars[f"{prefix}/share_{partition + 1}"][0] == (2, 100 * layer + partition)
    # gla layers have no router, and softmax layers have no health metrics.
    assert not [tag for tag in scalars if tag.startswith("sse/layer_03/share")]
    assert not [tag for tag in scalars if tag.startswith("sse/layer_04")]


def test_console_says_what_happens_and_where_things_are(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (lines,) = run_workers(1, run_monitor, str(tmp_path))
    steps, validation, with_accuracy, rest = lines[:4], lines[4], lines[5], lines[6:]
    assert steps[2].startswith(
        "step 3/10 | loss 2.5000 | balance 1.2500 | lr 3.00e-03 | grad norm 0.500 | 1,333 tokens/s"
    )
    assert steps[0].endswith("2s left")
    assert validation == "step 4/10 | validation loss 0.6931 | 1.500 bits per byte (single-byte frequencies: 4.500)"
    assert with_accuracy.startswith("step 4/10 | validation loss 0.6931 | accuracy 0.250 | 1.500 bits per byte")
    assert len(rest) == 1
    assert f"tensorboard --host 127.0.0.1 --logdir {tmp_path}/run/tensorboard" in rest[0]


def test_log_interval_gives_means_over_its_steps(tmp_path):
    (lines,) = run_workers(1, run_monitor, str(tmp_path), None, 10, 4)
    assert [line.split(" |")[0] for line in lines if "tokens/s" in line] == ["step 4/10", "step 8/10", "step 10/10"]
    # Step n takes n x 0.25 s, here for steps 5 to 8.
    assert read_events(tmp_path / "run")["speed/tokens_per_second"][1] == (
        8,
        pytest.approx(4000 / (0.25 * (5 + 6 + 7 + 8))),
    )


def test_bits_per_byte_of_a_blend(tmp_path):
    """Bytes of text add up by the files' shares of the samples."""
    one, other = (Metadata("bytes", 257, 1, tokens, 200, bits) for tokens, bits in ((200, 4.0), (400, 6.0)))
    blend = BytesOfTokens.of_blend([(one, 3.0), (other, 1.0)])
    # Of 4 tokens 3 are of one byte and 1 of half a byte.
    assert blend.bits_per_byte(math.log(2)) == pytest.approx(4 / 3.5)
    assert blend.unigram_bits_per_byte == pytest.approx((3 * 4.0 + 0.5 * 6.0) / 3.5)
    config = small_config(tmp_path)
    config.data.validation.append(Source(prefix=str(tmp_path / "other"), weight=2.0))
    assert bytes_of_validation(config) is None
    Metadata("bytes", 257, 1, 200, 200, 1.0).write(tmp_path / "other.json")
    assert bytes_of_validation(config).bytes_per_token == pytest.approx((200 / 300 + 2 * 1) / 3)
    config.data.validation_share, config.data.train, config.data.validation = 0.1, config.data.validation[1:], None
    assert bytes_of_validation(config) == BytesOfTokens(1.0, 1.0)


def test_memory_steps_without_a_gpu_say_so(tmp_path):
    (lines,) = run_workers(1, run_monitor, str(tmp_path), None, 1, 1, [1, 1])
    assert lines[0] == "monitor.memory_steps is ignored: there is no GPU whose memory could be recorded"


def test_the_saved_settings_load_to_the_same_run(tmp_path):
    run_workers(1, run_monitor, str(tmp_path))
    assert load_config(str(tmp_path / "run" / "config.yaml"), []) == small_config(tmp_path)
