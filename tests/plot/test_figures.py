"""Pictures show the numbers of the runs, and a layout's boxes are Megatron-Core's ranks."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from megatron.core.parallel_state import RankGenerator

from megatron_sse.plot import figures
from megatron_sse.plot.figures import running_mean
from megatron_sse.plot.layouts import Layout, draw_layout, find_layout
from megatron_sse.plot.loads import draw_entropy, draw_loads
from megatron_sse.plot.read import RunLog, read_runs
from tests.plot.runs import write_run


def read(folder: Path) -> RunLog:
    return read_runs([str(folder)])[0]


def test_loads_are_shares_against_the_even_one(tmp_path: Path) -> None:
    axes = Figure().add_subplot()
    draw_loads(axes, read(write_run(tmp_path)))
    # Two layers of four partitions have shares of 1, 2, 3 and 4 tenths at steps 10, 20, ..., 60.
    load = axes.collections[0].get_array()
    assert np.allclose(load, np.tile([[0.4], [0.8], [1.2], [1.6]], (2, 6)))
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1", "3"]
    assert [label.get_text() for label in axes.get_yticklabels(minor=True)] == ["1", "2", "3", "4"] * 2
    corners = axes.collections[0].get_coordinates()
    assert corners[0, :, 0].tolist() == [0, 10, 20, 30, 40, 50, 60]


def test_the_legend_of_the_loss_names_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, Figure] = {}
    monkeypatch.setattr(figures, "save_picture", lambda figure, path: drawn.update({path.stem: figure}))
    run = read(write_run(tmp_path / "run"))
    other = {"train/loss": [(1, 2.0)], "rl/reward": [(1, 0.5)], "validation/pass_at_1": [(1, 0.4)]}
    figures.draw_all([run, RunLog("other", run.settings, other)], tmp_path)
    # Of reinforcement learning, only where a run has it.
    assert {"reward", "pass_at_1"} <= set(drawn) and not {"answers", "logprob_error"} & set(drawn)
    legends = {name: [text.get_text() for text in drawn[name].legends[0].get_texts()] for name in ("loss", "memory")}
    assert legends == {"loss": ["run", "other", "validation"], "memory": ["run", "other"]}


def test_entropy_has_a_line_for_each_layer(tmp_path: Path) -> None:
    axes = Figure().add_subplot()
    draw_entropy(axes, read(write_run(tmp_path)))
    most = np.log(4)
    assert [line.get_ydata()[0] for line in axes.lines] == pytest.approx([most - 0.5, most - 0.5 / 3, most])


def test_runs_without_partitions_say_so(tmp_path: Path) -> None:
    run = read(write_run(tmp_path, model={"sse": {"num_heads": 2, "head_dim": 16, "num_partitions": 0}}))
    for draw in (draw_loads, draw_entropy):
        axes = Figure().add_subplot()
        draw(axes, RunLog(run.name, run.settings, {"train/loss": [(1, 1.0)]}))
        assert [text.get_text() for text in axes.texts] == ["no partitions"]


def test_running_mean() -> None:
    assert running_mean([3.0] * 100) == pytest.approx([3.0] * 100)
    means = running_mean([0.0] * 60 + [1.0] * 60)
    assert means[59] == 0 and means[60] > 0.2 and means[-1] > 0.99
    assert means == sorted(means)


@pytest.mark.parametrize("sizes", [(2, 2, 1, 3), (1, 2, 2, 2), (2, 1, 4, 1)], ids=str)
def test_ranks_are_those_of_megatron(sizes: tuple[int, int, int, int]) -> None:
    tensor, pipeline, context, data = sizes
    layout = Layout(tensor, pipeline, 1, context, data, ["sse"] * pipeline)
    generator = RankGenerator(tp=tensor, ep=1, dp=data, pp=pipeline, cp=context, order="tp-cp-ep-dp-pp")
    stages, copies, parts, slices = (range(size) for size in (pipeline, data, context, tensor))
    assert generator.get_ranks("tp") == [
        [layout.rank(s, c, p, t) for t in slices] for s in stages for c in copies for p in parts
    ]
    for axis, groups in {
        "cp": [[layout.rank(s, c, p, t) for p in parts] for s in stages for c in copies for t in slices],
        "dp": [[layout.rank(s, c, p, t) for c in copies] for s in stages for p in parts for t in slices],
        "pp": [[layout.rank(s, c, p, t) for s in stages] for c in copies for p in parts for t in slices],
    }.items():
        assert sorted(generator.get_ranks(axis)) == sorted(groups)


def test_layers_of_interleaved_stages() -> None:
    kinds = ["sse", "gla", "gdn", "softmax"] * 2
    assert Layout(1, 2, 2, 1, 1, kinds).stage_kinds(1) == ["gdn", "softmax"] * 2
    assert Layout(1, 2, 1, 1, 1, kinds).stage_kinds(1) == kinds[4:]


def test_a_drawing_has_a_box_for_each_process_and_layer(tmp_path: Path) -> None:
    run = read(write_run(tmp_path, processes=8, parallel={"tensor": 2, "pipeline": 2}))
    layout = find_layout(run)
    assert (layout.data, str(layout)) == (2, "tensor 2, pipeline 2, data 2")
    axes = Figure().add_subplot()
    draw_layout(axes, run)
    numbers = [text.get_text() for text in axes.texts if text.get_text().isdigit()]
    assert sorted(map(int, numbers)) == list(range(8))
    assert len(axes.patches) == 8 + 4


def test_of_many_copies_one_is_drawn(tmp_path: Path) -> None:
    axes = Figure().add_subplot()
    draw_layout(axes, read(write_run(tmp_path, processes=64, parallel={"tensor": 2})))
    assert len(axes.patches) == 2 + 4
    assert "copy 1 of 32" in [text.get_text() for text in axes.texts]
