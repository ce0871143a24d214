"""A run on GPUs as far as a machine without one can show it: no step waits, copies slowly or mixes devices."""

from pathlib import Path

import pytest

from tests.tools.rehearsals import CONFIG, ROOT, SMALL, Rehearsal, Wrong, rehearse

NORM = ("megatron/core/utils.py", "local_multi_tensor_l2_norm")
# What is known to be wrong today. Whoever mends one of these takes it out: a known fault that is not found fails too.
KNOWN: set[Wrong] = set()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a cache folder, in which the first rehearsal compiles the guard."""
    return tmp_path_factory.mktemp("cache")


# Micro-batches: the first layout has the three that show whether they are copied too early, the pipeline two.
LAYOUTS = {
    "one GPU, GLA": ("1", ["model.num_layers=3", "model.layers=sse, gdn, softmax"]),
    "context 2, GDN": (
        "2",
        ["model.num_layers=3", "model.layers=sse, gla, softmax", "model.sse.recurrence=gdn", "parallel.context=2"]
        + ["training.global_batch_size=1"],
    ),
    "tensor 2 with sequence parallelism, pipeline 2, recompute": (
        "4",
        ["model.num_layers=4", "model.layers=sse, softmax, gdn, sse", "parallel.tensor=2", "parallel.sequence=true"]
        + ["parallel.pipeline=2", "training.recompute=full", "training.global_batch_size=2"],
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_has_nothing_that_waits_or_fails(layout: str, cache: Path) -> None:
    ranks, overrides = LAYOUTS[layout]
    rehearsal = rehearse(cache, str(CONFIG), "--ranks", ranks, *SMALL, *overrides)
    assert rehearsal.wrong == KNOWN, rehearsal.said
    assert rehearsal.status == (1 if KNOWN else 0)
    for rank in {0, int(ranks) - 1}:
        assert f"rank {rank} of {ranks}: 2 steps, exit status 0\n" in rehearsal.said, rehearsal.said
    # In the background, and at the end.
    assert rehearsal.said.count("checkpoint saved") == 2 and rehearsal.said.count("validation loss") == 2


@pytest.fixture(scope="module")
def seeded(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Rehearsal:
    folder = f"monitor.folder={tmp_path_factory.mktemp('seeded')}"
    overrides = ["model.num_layers=2", "model.layers=sse, softmax", "model.sse.recurrence=gdn", "parallel.context=2"]
    return rehearse(cache, "2", *SMALL, *overrides, folder, module="tests.tools.rehearsals")


SEEDED = {
    "seeded_eye": "a copy to the GPU from memory that is not pinned",
    "seeded_process_group": "init_process_group without device_id",
    "seeded_copy": "a copy to the GPU from memory that is not pinned",
    "seeded_step": "more than one micro-batch copied ahead of the one that is computed",
    "read": "the host reads a value from the GPU",
    "mask": "boolean indexing, whose result has a size that only the GPU knows",
    # In validation, where answers are counted.
    "seeded_score": "boolean indexing, whose result has a size that only the GPU knows",
    "find": "a result whose size or value only the GPU knows",
    "mix": "tensors of the host and of the GPU in one operation",
    "wait": "the host waits for the GPU",
    "sum_on_host": "a collective on a tensor of the host",
}


@pytest.mark.parametrize("fault", SEEDED)
def test_a_seeded_fault_is_found(fault: str, seeded: Rehearsal) -> None:
    assert Wrong(SEEDED[fault], "tests/tools/rehearsals.py", fault) in seeded.wrong, seeded.said
    assert seeded.status == 1


def test_a_slow_gradient_norm_is_found(seeded: Rehearsal) -> None:
    assert Wrong("the host reads a value from the GPU", *NORM) in seeded.wrong, seeded.said


def test_a_buffer_on_the_host_is_found(seeded: Rehearsal) -> None:
    assert any(wrong.kind == "a parameter or buffer that stayed on the host" for wrong in seeded.wrong), seeded.said
    assert "(decoder.left)" in seeded.said


def test_without_a_compiler_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    rehearsal = rehearse(tmp_path / "cache", str(CONFIG), *SMALL)
    assert rehearsal.status == 2
    assert rehearsal.said.splitlines() == [
        "rehearse_gpu: g++: not found; the rehearsal compiles guard.cpp with it once (apt install g++)"
    ]


def test_a_wrong_setting_is_one_line(cache: Path) -> None:
    rehearsal = rehearse(cache, str(CONFIG), *SMALL, "--ranks", "3", "parallel.context=2")
    assert rehearsal.status == 2 and len(rehearsal.said.splitlines()) == 1, rehearsal.said
    assert (ROOT / "tools" / "rehearsal" / "guard.cpp").exists()
