"""Megatron-Core's optimizers with our weight-decay groups, and an Adam that their checkpoints can hold."""

from collections.abc import Callable, Iterable
from inspect import unwrap
from typing import Any

import megatron.core.optimizer as megatron_optimizer
import torch
from megatron.core.optimizer import (
    MegatronOptimizer,
    ParamKey,
    ParamWithNamePredicate,
    distrib_optimizer,
    get_megatron_optimizer,
)
from megatron.core.optimizer import OptimizerConfig as MegatronSettings
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.optim.adamw import adamw

from megatron_sse.config import RunConfig, uses_distributed_optimizer
from megatron_sse.parallel.device import without_stand_ins
from megatron_sse.training.foreach import replace_loops


class Adam(torch.optim.Optimizer):
    """AdamW that counts its steps once per parameter group, as the fused ones of Transformer Engine and Apex do.

    Megatron-Core's distributed optimizer cannot load checkpoints of torch's AdamW, which counts per parameter.
    """

    # torch wraps these so that TorchDynamo leaves them alone, and imports it for that: 0.5 CPU seconds. Nothing here is
    # compiled.
    add_param_group = unwrap(torch.optim.Optimizer.add_param_group)
    state_dict = unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = unwrap(torch.optim.Optimizer.load_state_dict)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        assert adam_w_mode and not capturable
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, step=0))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update the parameters that have a gradient."""
        with without_stand_ins():
            for group in self.param_groups:
                self._update(group)

    def _update(self, group: dict[str, Any]) -> None:
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        # On a GPU one kernel updates all parameters; it reads the numbers of steps there. On a CPU each operation goes
        # through all parameters in one call.
        fused = self._is_fused(parameters)
        where = parameters[0].device if fused else "cpu"
        # adamw() increments them, so it gets fresh ones.
        steps = torch.full((len(parameters),), float(group["step"]), device=where).unbind()
        adamw(
            parameters,
            [parameter.grad for parameter in parameters],
            [self.state[parameter]["exp_avg"] for parameter in parameters],
            [self.state[parameter]["exp_avg_sq"] for parameter in parameters],
            [],
            list(steps),
            foreach=not fused,
            fused=fused,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        group["step"] += 1

    @staticmethod
    def _is_fused(parameters: list[torch.Tensor]) -> bool:
        return bool(parameters) and all(parameter.is_cuda for parameter in parameters)


def build_optimizer(
    config: RunConfig, chunks: list[torch.nn.Module], groups: ProcessGroupCollection
) -> MegatronOptimizer:
    """Build Megatron-Core's AdamW over model chunks in DDP: plain, mixed-precision or distributed, as the run asks."""
    on_gpu = next(chunks[0].parameters()).is_cuda
    provide_adam(on_gpu)
    replace_loops(on_gpu)
    settings = config.optimizer
    bf16 = config.training.precision == "bf16"
    no_decay = ParamWithNamePredicate("no_decay", lambda parameter, name: not parameter.weight.decayed)
    in_fp32 = ParamWithNamePredicate("in_fp32", lambda parameter, name: bf16 and parameter.dtype == torch.float32)
    return get_megatron_optimizer(
        MegatronSettings(
            lr=settings.learning_rate,
            min_lr=settings.min_learning_rate,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.beta1,
            adam_beta2=settings.beta2,
            adam_eps=settings.epsilon,
            clip_grad=settings.clip_grad,
            bf16=bf16,
            params_dtype=torch.bfloat16 if bf16 else torch.float32,
            use_distributed_optimizer=uses_distributed_optimizer(config),
        ),
        chunks,
        # The distributed optimizer's checkpoints need parameter groups of one dtype, which differ in one of a few keys;
        # is_decoupled_lr is such a key, and has no other effect here.
        config_overrides={
            ParamKey(with_name_predicate=no_decay): {"wd_mult": 0.0},
            ParamKey(with_name_predicate=in_fp32): {"is_decoupled_lr": True},
        },
        use_gloo_process_groups=False,
        pg_collection=groups,
    )


def set_learning_rate(optimizer: MegatronOptimizer, learning_rate: float) -> None:
    """Set the learning rate of the next step, and each group's weight decay (a loaded checkpoint has changed it)."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
        group["weight_decay"] = optimizer.config.weight_decay * group["wd_mult"]


def provide_adam(on_gpu: bool) -> None:
    """Give Megatron-Core our Adam for the FusedAdam that it expects: where none is installed, and on the CPU."""
    if megatron_optimizer.USING_PYTORCH_OPTIMIZER or not on_gpu:
        megatron_optimizer.Adam = distrib_optimizer.Adam = Adam
        megatron_optimizer.USING_PYTORCH_OPTIMIZER = distrib_optimizer.USING_TE_OPTIMIZER = False
        distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True
