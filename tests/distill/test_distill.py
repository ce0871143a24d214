"""Training beside a teacher: one step against torch's autograd, layouts against one process, and what is refused."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from megatron_sse.checkpoint.reference import describe_reference
from megatron_sse.config import RunConfig
from megatron_sse.data.iterators import build_data_iterators
from megatron_sse.distill.layers import _Distance
from megatron_sse.distill.objective import Distillation
from megatron_sse.distill.run import DistillRun, check_same_teacher
from megatron_sse.distill.teacher import open_teacher
from megatron_sse.errors import UserError
from megatron_sse.model.initialize import global_name, own_part
from megatron_sse.parallel.groups import init_groups
from megatron_sse.run_folder import METRICS
from megatron_sse.training.loop import Run, Signals
from tests.training.support import cpu, small_run
from tests.training.test_layouts import Part
from tests.workers import WorkerError, run_workers

COMMON = {"num_layers": 2, "hidden_size": 32, "vocab_size": 64, "softmax": {"num_heads": 4, "num_kv_heads": 2}}
SSE = {"num_heads": 2, "head_dim": 8, "num_partitions": 3}
TEACHER: dict[str, Any] = {**COMMON, "layers": "softmax", "init_std": 0.2}
STUDENT: dict[str, Any] = {**COMMON, "layers": "sse, softmax", "sse": SSE, "init_std": 0.1, "input_convolution": 3}
# All parts of the loss, with weights that differ.
WEIGHTS = {"logits": 0.7, "hidden": 0.4, "labels": 0.3, "temperature": 1.7}


def train_teacher(folder: Path) -> str:
    """Train two steps in a process of the pool, with a checkpoint after each; return the run's folder."""
    sections = {"training": {"steps": 2}, "checkpoint": {"interval": 1, "asynchronous": False}}
    config = small_run(folder, model=TEACHER, monitor={"folder": str(folder / "teacher")}, **sections)
    Run(config, init_groups(), cpu(), None).run(Signals())
    return config.monitor.folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distill")
    small_run(folder)
    [path] = run_workers(1, train_teacher, folder)
    return Path(path)


def student_config(teacher: Path, distill: dict[str, Any], **sections: dict[str, Any]) -> RunConfig:
    training = {"steps": 3, "distill": {"teacher": str(teacher)} | distill, **sections.pop("training", {})}
    return small_run(
        teacher.parent,
        training=training,
        **{"model": STUDENT, "data": {"sequence_length": 32}, "optimizer": {"clip_grad": 1e9}} | sections,
    )


def start(config: RunConfig, *others: Any) -> DistillRun:
    parallel = config.parallel
    groups = init_groups(parallel.tensor, parallel.pipeline, parallel.virtual_pipeline, parallel.context)
    return DistillRun(open_teacher(config), config, groups, cpu(), None, *others)


@dataclass
class Step:
    """The first step on a rank: its losses, and gradients by name in the complete model."""

    losses: dict[str, float]
    gradients: dict[str, Part]
    tensor_rank: int


def take_step(config: RunConfig) -> Step:
    run = start(config)
    iterator, _ = build_data_iterators(run.stage, run.groups, 0)
    losses = run.trainer.train_step(iterator).losses
    [chunk] = run.trainer.chunks
    parts = {global_name(name, chunk.module): Part(parameter) for name, parameter in chunk.module.named_parameters()}
    return Step(losses, parts, run.groups.tp.rank())


def plain_step(config: RunConfig) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Return losses and gradients by torch's autograd from all logits and layers' outputs at once."""
    run = start(config)
    iterator, _ = build_data_iterators(run.stage, run.groups, 0)
    batches = [next(iterator) for _ in range(run.trainer.num_micro_batches)]
    student, objective = run.trainer.chunks[0].module, run.trainer.objective
    assert isinstance(objective, Distillation)
    outputs: dict[str, list[Tensor]] = {"student": [], "teacher": []}
    for name, net in (("student", student), ("teacher", objective.teacher)):
        for layer in net.decoder.layers:
            layer._forward_hooks.clear()
            layer.register_forward_hook(lambda *passed, name=name: outputs[name].append(passed[2][0]))
    sums = dict.fromkeys(("loss", "divergence", "hidden"), torch.zeros(()))
    for batch in batches:
        logits = {}
        for name, net in (("student", student), ("teacher", objective.teacher)):
            outputs[name].clear()
            logits[name] = net(batch.tokens_BL, packed_seq_params=batch.layout)[..., : config.model.vocab_size]
        mask_BL, scale = batch.loss_mask_BL, WEIGHTS["temperature"]
        loss_BL = cross_entropy(logits["student"].flatten(0, 1), batch.labels_BL.flatten(), reduction="none")
        log_q, log_p = (log_softmax(logits[name] / scale, -1) for name in ("student", "teacher"))
        found = {
            "loss": loss_BL.view_as(mask_BL) * mask_BL,
            "divergence": kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1) * mask_BL,
            "hidden": torch.stack(
                [
                    (ours - theirs).square().sum(-1).t() / theirs.square().sum(-1).t() * mask_BL
                    for ours, theirs in zip(outputs["student"], outputs["teacher"], strict=True)
                ]
            ).mean(0),
        }
        sums = {name: sums[name] + part.sum() for name, part in found.items()}
    tokens = sum(batch.loss_mask_BL.sum() for batch in batches)
    factors = {
        "loss": WEIGHTS["labels"],
        "divergence": WEIGHTS["logits"] * WEIGHTS["temperature"] ** 2,
        "hidden": WEIGHTS["hidden"],
    }
    total = sum(factors[name] * part for name, part in sums.items()) / tokens
    names = [name for name, _ in student.named_parameters()]
    gradients = torch.autograd.grad(total, list(student.parameters()))
    losses = {name: float(part / tokens) for name, part in sums.items()}
    return losses, dict(zip(names, gradients, strict=True))


NO_BALANCE = {"model": STUDENT | {"sse": SSE | {"balance_loss": 0.0}}}


def test_a_step_is_that_of_the_plain_form(teacher: Path) -> None:
    config = student_config(teacher, WEIGHTS, **NO_BALANCE)
    [step], [(losses, gradients)] = run_workers(1, take_step, config), run_workers(1, plain_step, config)
    assert {name: step.losses[name] for name in losses} == pytest.approx(losses, rel=1e-5)
    # The teacher is another model, so that nothing of this is small.
    assert min(losses.values()) > 0.1
    assert step.gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        error = (step.gradients[name].gradient - gradient).norm() / gradient.norm()
        assert error < 2e-5, f"{name}: {error:.1e}"


@pytest.fixture(scope="module")
def one_process(teacher: Path) -> Step:
    [step] = run_workers(1, take_step, student_config(teacher, WEIGHTS))
    return step


LAYOUTS: list[tuple[int, dict[str, Any], str]] = [
    (1, {}, "full"),
    (2, {"tensor": 2, "sequence": True}, "none"),
    (2, {"context": 2, "layout": "zigzag"}, "none"),
    (2, {"context": 2}, "full"),
    (2, {}, "none"),
    (4, {"context": 2, "tensor": 2, "sequence": False}, "mixer"),
]


@pytest.mark.parametrize(("world_size", "parallel", "recompute"), LAYOUTS, ids=str)
def test_like_one_process(
    world_size: int, parallel: dict[str, Any], recompute: str, teacher: Path, one_process: Step
) -> None:
    config = student_config(teacher, WEIGHTS, parallel=parallel, training={"recompute": recompute})
    for step in run_workers(world_size, take_step, config):
        assert step.losses == pytest.approx(one_process.losses, rel=1e-5)
        assert step.gradients.keys() == one_process.gradients.keys()
        for name, part in step.gradients.items():
            whole = one_process.gradients[name].gradient
            own = own_part(whole, part, step.tensor_rank, parallel.get("tensor", 1))
            error = (part.gradient - own).norm() / whole.norm()
            assert error < 1e-5, f"{name}: {error:.1e}"


def finish(config: RunConfig, weights: Path | None) -> list[tuple[int, dict[str, float]]]:
    """Run to the end; return the lines of metrics.jsonl with their steps."""
    run = start(config, weights)
    run.run(Signals())
    lines = map(json.loads, (Path(config.monitor.folder) / METRICS).read_text().splitlines())
    return [(line["step"], line) for line in lines]


def test_a_model_that_is_its_teacher_has_nothing_to_learn(teacher: Path) -> None:
    """Without labels, and with the teacher's weights, all distances and gradients are 0; they are written down."""
    first = teacher / "checkpoints/iter_0000001"
    config = student_config(
        teacher,
        {"labels": 0.0, "hidden": 1.0, "teacher": str(first)},
        model=TEACHER,
        data={"validation": str(teacher.parent / "train")},
        # AdamW makes whole steps of gradients that are rounding.
        optimizer={"learning_rate": 1e-12, "weight_decay": 0.0},
        training={"validation_interval": 3},
        monitor={"folder": str(teacher.parent / "same")},
    )
    [found] = run_workers(1, finish, config, first)
    said = {key: value for step, scalars in found for key, value in scalars.items() if step == 3}
    assert said["distill/divergence"] == pytest.approx(0, abs=1e-6)
    assert max(said["distill/hidden"], said["validation/hidden"]) < 1e-9
    assert said["validation/divergence"] == pytest.approx(0, abs=1e-6)
    assert said["validation/loss"] > 1
    teacher_stays(teacher, Path(config.monitor.folder) / "checkpoints/iter_0000003")


def teacher_stays(teacher: Path, resume: Path) -> None:
    """Check that a resumed run has the teacher that it had, or is refused."""
    first, newest = (teacher / f"checkpoints/iter_000000{step}" for step in (1, 2))
    config = student_config(teacher, {}, model=TEACHER)
    assert open_teacher(config).model.folder == newest
    assert open_teacher(config, resume).model.folder == first
    hidden = first.rename(teacher / "hidden")
    with pytest.raises(UserError, match=r"^training.distill.teacher: got .*, and training.distill has been measured f"):
        open_teacher(config, resume)
    hidden.rename(first)


def test_distance_of_layers() -> None:
    """As the plain form, in fp64; an output of zeros counts nothing."""
    x_LBd, wanted_LBd = torch.randn(2, 4, 3, 5, dtype=torch.float64).unbind()
    wanted_LBd[1, 2] = 0
    mask_LB = torch.rand(4, 3, dtype=torch.float64)
    counts_LB = mask_LB.clone()
    counts_LB[1, 2] = 0
    x_LBd.requires_grad_()
    found = _Distance.apply(x_LBd, wanted_LBd, mask_LB)
    size_LB = wanted_LBd.square().sum(-1)
    size_LB[1, 2] = 1
    plain = ((x_LBd - wanted_LBd).square().sum(-1) / size_LB * counts_LB).sum()
    torch.testing.assert_close(found, plain)
    [ours], [theirs] = (torch.autograd.grad(3 * loss, x_LBd) for loss in (found, plain))
    torch.testing.assert_close(ours, theirs)


def distinct_teachers(folder: Path) -> None:
    step = int(os.environ["RANK"]) + 1
    path = folder / f"checkpoints/iter_000000{step}"
    check_same_teacher(path, describe_reference(path))


def test_all_ranks_have_the_same_teacher(teacher: Path) -> None:
    with pytest.raises(WorkerError, match="SharedUserError: training.distill.teacher: got .*iter_0000001 on one pro"):
        run_workers(2, distinct_teachers, teacher)


WRONG: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"teacher": "nowhere"}, {}, "training.distill.teacher: folder nowhere not found"),
    (
        {},
        {"model": {**STUDENT, "vocab_size": 65}},
        "training.distill.teacher: got a model of vocab_size 64, allowed 65, the run's model.vocab_size",
    ),
    (
        {"hidden": 1.0},
        {"model": {**STUDENT, "num_layers": 4}},
        "training.distill.teacher: got a model of num_layers 2, allowed 4, the run's model.num_layers, with "
        "training.distill.hidden",
    ),
]


@pytest.mark.parametrize(("distill", "sections", "message"), WRONG, ids=range(len(WRONG)))
def test_a_wrong_teacher(distill: dict[str, Any], sections: dict[str, Any], message: str, teacher: Path) -> None:
    with pytest.raises(UserError) as raised:
        open_teacher(student_config(teacher, distill, **sections))
    assert str(raised.value) == message


def test_a_teacher_that_cannot_be_split_as_the_run_is(teacher: Path) -> None:
    """The teacher has 4 heads and 2 of keys, the student 8 of both."""
    model = STUDENT | {"sse": SSE | {"num_heads": 8}, "softmax": {"num_heads": 8}}
    config = student_config(teacher, {}, model=model, parallel={"tensor": 8})
    with pytest.raises(
        UserError, match=r"^training.distill.teacher .*: model.softmax.num_heads: got 4, allowed a mult"
    ):
        open_teacher(config)


@pytest.mark.parametrize(
    ("distill", "parallel", "message"),
    [
        ({}, {"pipeline": 2}, "parallel.pipeline: got 2, allowed 1 with training.distill"),
        ({"logits": 0.0}, {}, "training.distill.logits: got 0.0, allowed more than 0 while training.distill.hidden"),
    ],
)
def test_settings_that_do_not_fit(
    distill: dict[str, Any], parallel: dict[str, Any], message: str, teacher: Path
) -> None:
    with pytest.raises(ValidationError, match=message):
        student_config(teacher, distill, parallel=parallel)
