"""Groups of weight decay, and Adam against torch's own."""

import copy
from pathlib import Path
from typing import Any

import megatron.core.optimizer as megatron_optimizer
import pytest
import torch
from megatron.core.optimizer import clip_grads, distrib_optimizer
from torch.optim.adamw import adamw

from megatron_sse.training import optimizer
from megatron_sse.training.foreach import replace_loops
from megatron_sse.training.optimizer import Adam, set_learning_rate
from tests.training.support import small_run, start
from tests.workers import run_workers


def undecayed_names(folder: Path, recurrence: str, distributed_optimizer: bool) -> tuple[list[str], list[str]]:
    """Return the names of parameters without and with weight decay, without layer numbers."""
    sse = {"num_heads": 2, "head_dim": 16, "recurrence": recurrence, "short_convolution": 4}
    config = small_run(
        folder,
        model={
            "num_layers": 2,
            "hidden_size": 32,
            "vocab_size": 64,
            "layers": "sse, softmax",
            "sse": sse,
            "softmax": {"num_heads": 2, "qk_norm": True},
        },
        parallel={"distributed_optimizer": distributed_optimizer},
    )
    run = start(config)
    set_learning_rate(run.trainer.optimizer, 0.25)
    sizes = {0.0: 0, 0.1: 0}
    for group in run.trainer.optimizer.param_groups:
        assert group["lr"] == 0.25
        sizes[group["weight_decay"]] += sum(parameter.numel() for parameter in group["params"])
    names: tuple[list[str], list[str]] = ([], [])
    expected = {0.0: 0, 0.1: 0}
    for name, parameter in run.trainer.chunks[0].module.named_parameters():
        names[parameter.weight.decayed].append(name)
        expected[0.1 if parameter.weight.decayed else 0.0] += parameter.numel()
    assert sizes == expected
    return names


@pytest.mark.parametrize("distributed_optimizer", [False, True])
def test_norms_biases_and_decay_parameters_are_not_decayed(tmp_path: Path, distributed_optimizer: bool) -> None:
    [(undecayed, decayed)] = run_workers(1, undecayed_names, tmp_path, "gdn", distributed_optimizer)
    for part in ("A_log", "dt_bias", "input_layernorm", "pre_mlp_layernorm", "final_layernorm", "q_layernorm"):
        assert any(part in name for name in undecayed), part
        assert not any(part in name for name in decayed), part
    for part in ("embedding", "output_layer", "linear_fc1", "linear_fc2", "linear_qkv", "router"):
        assert any(part in name for name in decayed), part
        assert not any(part in name for name in undecayed), part


def test_biases_of_the_gates_are_not_decayed(tmp_path: Path) -> None:
    [(undecayed, decayed)] = run_workers(1, undecayed_names, tmp_path, "gla", False)
    assert any(name.endswith("bias") for name in undecayed)
    assert not any(name.endswith("bias") for name in decayed)


def weights_after(optimizer: torch.optim.Optimizer, weights: list[torch.nn.Parameter], num_steps: int) -> None:
    for step in range(num_steps):
        generator = torch.Generator().manual_seed(step)
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()


def test_adam_steps_like_torchs_adamw() -> None:
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in ((3, 4), (5,), (2, 2, 2))]
    theirs = copy.deepcopy(ours)
    settings: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}
    groups = [[{"params": w[:1], "weight_decay": 0.3}, {"params": w[1:], "weight_decay": 0.0}] for w in (ours, theirs)]
    weights_after(Adam(groups[0], weight_decay=0.3, **settings), ours, 5)
    weights_after(torch.optim.AdamW(groups[1], **settings), theirs, 5)
    for our, their in zip(ours, theirs, strict=True):
        assert torch.equal(our, their)


def test_the_fused_adam_of_gpus_steps_like_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Adam, "_is_fused", staticmethod(lambda parameters: True))
    called = []

    def watched(*args: Any, fused: bool | None, **kwargs: Any) -> None:
        called.append(fused)
        adamw(*args, fused=fused, **kwargs)

    monkeypatch.setattr(optimizer, "adamw", watched)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in ((3, 4), (5,))]
    theirs = copy.deepcopy(ours)
    settings: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.3}
    weights_after(Adam(ours, **settings), ours, 5)
    weights_after(torch.optim.AdamW(theirs, **settings), theirs, 5)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert called == [True] * 5


@pytest.mark.parametrize("size", [1.0, 1e-4])
def test_norm_and_clipping_read_nothing_on_the_host(size: float) -> None:
    """A number read from a tensor of the meta device is an error, as it is a wait on a GPU."""
    replace_loops(on_gpu=False)
    gradients = [torch.ones(shape, device="meta") for shape in ((3, 4), (5,), (2, 2))]
    norm, _ = clip_grads.multi_tensor_applier(clip_grads.l2_norm_impl, None, [gradients], False)
    assert norm.shape == (1,) and norm.is_meta
    clip_grads.multi_tensor_applier(clip_grads.multi_tensor_scale_impl, None, [gradients, gradients], 0.5)
    real = [size * torch.randn(shape) for shape in ((3, 4), (5,), (2, 2))]
    expected = torch.cat([x.flatten() for x in real]).norm()
    torch.testing.assert_close(clip_grads.l2_norm_impl(1, None, [real], False)[0], expected[None])
    halves = [x.bfloat16() for x in real]
    clip_grads.multi_tensor_scale_impl(1, None, [real, halves], 0.5)
    assert all(torch.equal(half, (0.5 * x).bfloat16()) for half, x in zip(halves, real, strict=True))
    whole = [x.clone() for x in real]
    clip_grads.multi_tensor_scale_impl(1, None, [whole, whole], 0.5)
    assert all(torch.equal(x, 0.5 * y) for x, y in zip(whole, real, strict=True))


@pytest.mark.parametrize("on_gpu", [False, True])
def test_kernels_of_gpus_are_left_out_on_the_cpu(on_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Transformer Engine is installed, Megatron-Core takes its kernels, which cannot read tensors of the CPU."""

    def kernel(*args: Any) -> None:
        raise AssertionError("a kernel of GPUs")

    for module, name in (
        (clip_grads, "l2_norm_impl"),
        (clip_grads, "multi_tensor_scale_impl"),
        (megatron_optimizer.optimizer, "multi_tensor_scale_impl"),
        (megatron_optimizer, "Adam"),
        (distrib_optimizer, "Adam"),
    ):
        monkeypatch.setattr(module, name, kernel)
    monkeypatch.setattr(megatron_optimizer, "USING_PYTORCH_OPTIMIZER", False)
    monkeypatch.setattr(distrib_optimizer, "USING_TE_OPTIMIZER", True)
    replace_loops(on_gpu)
    optimizer.provide_adam(on_gpu)
    found = {
        clip_grads.l2_norm_impl,
        clip_grads.multi_tensor_scale_impl,
        megatron_optimizer.optimizer.multi_tensor_scale_impl,
        megatron_optimizer.Adam,
        distrib_optimizer.Adam,
    }
    assert found == {kernel} if on_gpu else kernel not in found
    assert distrib_optimizer.USING_TE_OPTIMIZER == on_gpu


def test_adam_resumes_from_its_saved_state() -> None:
    straight = [torch.nn.Parameter(torch.ones(3))]
    settings: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
    first = Adam(straight, **settings)
    weights_after(first, straight, 2)
    broken_off = copy.deepcopy(straight)
    second = Adam(broken_off, **settings)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.param_groups[0]["step"] == 2
    weights_after(first, straight, 2)
    weights_after(second, broken_off, 2)
    assert torch.equal(straight[0], broken_off[0])
