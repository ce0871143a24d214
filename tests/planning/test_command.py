"""The command plan: what fits, which layouts are found, and the errors of wrong requests."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_sse.cli import main
from megatron_sse.config import load_config
from megatron_sse.costs.gpus import GPUS
from megatron_sse.errors import UserError
from megatron_sse.planning.command import find_gpu
from megatron_sse.planning.documents import count_documents
from megatron_sse.planning.hand_off import Links
from megatron_sse.planning.memory import passes_under_way, rank_memory
from megatron_sse.planning.request import Request, parse_bytes
from megatron_sse.planning.search import (
    HEADROOM,
    longest_sequence,
    search_layouts,
    with_settings,
    work_out,
    work_out_all,
)
from megatron_sse.planning.sizes import Sizes
from tests.data.files import write_tokens

CONFIG = str(Path(__file__).resolve().parents[2] / "configs" / "sse_h_2b.yaml")
H100 = GPUS["h100"]


def test_output_has_every_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", CONFIG, "--gpus", "16", "parallel.context=2", "parallel.pipeline=2"]) == 0
    text = capsys.readouterr().out
    for part in (
        "processes         16 (tensor 1 x pipeline 2 x context 2 x data 4)",
        "total                          1,837,236,096",
        "stage 1",
        "with recompute: none",
        "longest sequence that fits",
        "gdn layer, forward",
        "sending, context",
    ):
        assert part in text


def test_the_hand_off_is_that_of_the_machines(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, chosen in (([], "exscan"), (["--gpus-per-node", "4"], "two_level")):
        assert main(["plan", CONFIG, "--gpus", "8", "parallel.context=8", *arguments]) == 0
        rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.endswith("chosen")]
        assert [row[0] for row in rows] == [chosen]


def test_times_of_a_hand_off() -> None:
    """Milliseconds forward of a layer with 32 heads of 128 x 128 and 64 partitions, worked out apart from this code."""
    state = 4 * 65 * 32 * 128 * 128
    expected = {16: (3.31, 1.18, 8.7), 64: (5.82, 1.50, 44.5), 256: (6.81, 1.62, 187.7), 1024: (8.49, 1.83, 760.3)}
    for size, times in expected.items():
        links = Links(H100, size, 8)
        found = [1000 * links.seconds(name, state / 128, state) for name in ("exscan", "two_level", "p2p")]
        assert found == pytest.approx(times, rel=0.025)


def test_exit_status_says_whether_it_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", CONFIG, "--gpus", "8", "--memory", "8GiB"]) == 1
    assert "does NOT fit" in capsys.readouterr().out
    assert main(["plan", CONFIG, "--gpus", "8", "--memory", "1GiB", "--search"]) == 1
    first, _, nearest, last = capsys.readouterr().out.splitlines()
    assert first == "no layout of 8 GPUs fits; the nearest:"
    *_, peak, _ = nearest.split()
    # Of 1 GiB a tenth is left free.
    lacks = f"it lacks {float(peak) - 0.9:.1f} GiB of memory per GPU (0.9 there); more GPUs, "
    assert "full" in nearest and last.startswith(lacks)
    needed = [layout.peak for layout in work_out_all(load_config(CONFIG), 8, H100, per_node=8)]
    assert float(peak) == pytest.approx(min(needed) / 2**30, abs=0.05) and len(needed) > 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "h9"], "--gpu: got h9, allowed a100, h100, h200, b200\n"),
        (["--memory", "80"], "--memory: got 80, allowed a number with GiB, GB, MiB, MB, such as 80GiB\n"),
        (["--gpus", "3"], "training.global_batch_size: got 256, allowed a multiple of 3"),
        (["--gpus", "0"], "--gpus: got 0, allowed 1 to 1048576\n"),
        (["--gpus-per-node", "0"], "--gpus-per-node: got 0, allowed 1 to 1048576\n"),
        (["--tflops", "0"], "--tflops: got 0.0, allowed more than 0\n"),
    ],
)
def test_refused_in_one_line(arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", CONFIG, *arguments]) == 2
    errors = capfd.readouterr().err
    assert errors.startswith(message) and errors.count("\n") == 1


def test_numbers_over_those_of_the_table() -> None:
    gpu = find_gpu(Request(config="", gpu="h200", tflops=770, bandwidth=4.3, memory="100GiB"))
    assert (gpu.flops, gpu.bandwidth, gpu.memory) == (770e12, 4.3e12, 100 * 2**30)
    with pytest.raises(UserError, match="--memory: got 0GB"):
        parse_bytes("0GB")


def test_longest_sequence_is_the_longest() -> None:
    config = load_config(CONFIG, ["parallel.context=4", "parallel.tensor=2", "parallel.sequence=true"])
    longest = longest_sequence(config, 1, H100)
    step = 2 * 4 * 2
    assert longest and longest % step == 0
    for length, fits in ((longest, True), (longest + step, False)):
        sizes = Sizes(with_settings(config, data={"sequence_length": length}), 1)
        assert (rank_memory(sizes, 0).total <= (1 - HEADROOM) * H100.memory) == fits


def test_longest_sequence_with_answers() -> None:
    """With shared prompts the answers' states count; where not even one answer fits, the length is 0."""
    config = load_config(Path(CONFIG).parent / "rl_arithmetic.yaml", ["rl.share_prefixes=true"])
    longest = longest_sequence(config, 1, H100)
    for length, fits in ((longest, True), (longest + 2, False)):
        longer = with_settings(config, data={"sequence_length": length})
        sizes = Sizes(longer, 1, documents=count_documents(longer, None))
        assert sizes.documents > 100
        assert (rank_memory(sizes, 0).total <= (1 - HEADROOM) * H100.memory) == fits
    assert longest_sequence(config, 1, replace(H100, memory=1000)) == 0


def test_search_finds_what_fits_and_ranks_it() -> None:
    config = load_config(CONFIG, ["data.sequence_length=262144", "training.global_batch_size=32"])
    found = search_layouts(config, 16, H100, per_node=8)
    times = [layout.time.total for layout in found]
    assert times == sorted(times) and len(found) > 5
    for layout in found:
        assert layout.fits(H100)
        assert layout.sizes.data_size * layout.sizes.config.parallel.replica_size == 16
    # One GPU cannot hold the activations of 262,144 tokens.
    assert all(layout.sizes.config.parallel.replica_size > 1 for layout in found)
    assert {layout.sizes.config.parallel.context for layout in found} >= {2, 4, 8}


def test_time_is_the_ceilings() -> None:
    config = load_config(CONFIG, ["training.recompute=none"])
    time = work_out(config, 8, H100, per_node=8).time
    tokens = 256 * 8192
    # The backward pass computes the logits again: 2 x 2048 x 151,936 operations.
    assert time.products == pytest.approx((9552.0e6 + 622.3e6) * tokens / 8 / 989e12, rel=1e-3)
    # Twelve bytes of gradients and weights for each of 8 ranks' parameters, at NVLink's 450 GB/s.
    assert time.data == pytest.approx(7 / 8 * 6 * 1_837_236_096 / 450e9, rel=1e-2)
    assert work_out(config, 16, H100, per_node=8).time.data > 8 * time.data
    recomputed = work_out(load_config(CONFIG), 8, H100, per_node=8).time
    assert recomputed.products == pytest.approx(9552.0e6 * 4 / 3 * tokens / 8 / 989e12, rel=1e-3)
    # 6 x 2048 x 8192 operations in each of 18 layers.
    mlp = work_out(load_config(CONFIG, ["training.recompute=mlp"]), 8, H100, per_node=8).time
    assert mlp.products - time.products == pytest.approx(18 * 100.7e6 * tokens / 8 / 989e12, rel=1e-2)


MILLION = ["data.sequence_length=1048576", "training.global_batch_size=1"]


def test_a_million_tokens_fit_on_eight_gpus_of_80_gib(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", CONFIG, "--gpus", "8", "--memory", "80GiB", "--search", *MILLION]) == 0
    assert "layouts of 8 GPUs that fit" in capsys.readouterr().out
    million = str(Path(CONFIG).with_name("sse_h_2b_1m.yaml"))
    assert main(["plan", million]) == 0
    assert "2 sequences of 1,048,576" in capsys.readouterr().out


def test_advice_is_about_what_is_largest_and_helps(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", CONFIG, "--gpus", "8", "parallel.context=8", *MILLION]
    assert main([*arguments, "training.loss_chunk=131072"]) == 1
    text = capsys.readouterr().out
    assert "largest: logits, 83%; smaller with a smaller training.loss_chunk, or more parallel.tensor" in text
    assert main(arguments) == 0
    assert main([*arguments, "training.recompute=none"]) == 1
    text = capsys.readouterr().out
    assert "largest: activations, 96%; smaller with training.recompute: full" in text
    # Where no layout fits, the nearest is shown with the same advice.
    assert main(["plan", CONFIG, "--gpus", "8", "--memory", "8GiB", "--search", *MILLION]) == 1
    first, _, nearest, last = capsys.readouterr().out.splitlines()
    assert first == "no layout of 8 GPUs fits; the nearest:" and "full" in nearest
    assert last.startswith("it lacks ") and "largest: " in last


def test_documents_are_those_of_the_token_file(tmp_path: Path) -> None:
    write_tokens(str(tmp_path / "train"), [[1] * 100] * 10)
    config = load_config(CONFIG, [f"data.train={tmp_path}/train", "data.sequence_length=1024"])
    assert count_documents(config, None) == 11
    assert count_documents(config, 3) == 3
    assert count_documents(load_config(CONFIG), None) == 1
    joined = load_config(CONFIG, [f"data.train={tmp_path}/train", "data.reset_at_documents=false"])
    assert count_documents(joined, None) == 1
    one, many = (work_out(config, 8, H100, 8, documents) for documents in (1, 8))
    # Softmax layers attend to less, and there are more segments.
    assert many.time.products < one.time.products and many.peak >= one.peak


def test_passes_under_way_follow_the_schedules() -> None:
    plain = Sizes(load_config(CONFIG, ["parallel.pipeline=3", "training.global_batch_size=8"]), 1)
    assert [passes_under_way(plain, stage) for stage in range(3)] == [3, 2, 1]
    few = Sizes(load_config(CONFIG, ["parallel.pipeline=3", "training.global_batch_size=2"]), 1)
    assert [passes_under_way(few, stage) for stage in range(3)] == [2, 2, 1]
    overrides = ["parallel.pipeline=3", "parallel.virtual_pipeline=2", "training.global_batch_size=9"]
    virtual = Sizes(load_config(CONFIG, overrides), 1)
    assert [passes_under_way(virtual, stage) for stage in range(3)] == [8, 6, 4]
