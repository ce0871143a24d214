"""A stand-in for Transformer Engine's compiled part, under its real Python code: shapes and devices, no numbers.

Written for version 2.11. Functions that a run does not call are refused by name.
"""

import enum
import logging
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from megatron_sse.tools.rehearsal.findings import Kind

Note = Callable[[Kind, str], None]
EXTENSION = "transformer_engine_torch"
logger = logging.getLogger("megatron_sse")


def install_engine(folder: Path, note: Note) -> None:
    """Import Transformer Engine's Python code from `folder`, its unpacked wheel, over the stand-in.

    Call it after the stand-ins for torch.cuda, and before Megatron-Core is imported.
    """
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # then it does not load its library of kernels
    sys.path.insert(0, str(folder))
    sys.modules[EXTENSION] = _Extension(note)
    # Only its export to ONNX uses these.
    for name in ("onnx", "onnxscript"):
        sys.modules.setdefault(name, _Anything(name))
    # It says that its library of kernels is missing.
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="transformer_engine")
    import transformer_engine.common as common

    common.load_framework_extension = lambda framework: None
    import transformer_engine.pytorch.attention.dot_product_attention.utils as attention

    choose = attention.get_attention_backend

    def get_attention_backend(params: Any) -> Any:
        # It asks for the very type of the queries.
        return choose(replace(params, qkv_type=torch.Tensor) if params.qkv_type is FakeTensor else params)

    attention.get_attention_backend = get_attention_backend


class _Names(type):
    """An enumeration of C++: any name is a member."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        member = _Member(f"{cls.__name__}.{name}")
        setattr(cls, name, member)
        return member


class _Member(str):
    def __int__(self) -> int:
        return 0

    __index__ = __int__


class _Anything(ModuleType):
    """A module that has whatever is asked for."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        # torch looks for modules by their spec.
        self.__spec__ = ModuleSpec(name, None)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing()


class _Nothing:
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # As a decorator it leaves the function as it is.
        return args[0] if args and callable(args[0]) else self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __getitem__(self, key: Any) -> Any:
        return self


class _ForwardTensors(enum.IntEnum):
    GEMM1_INPUT = 0
    GEMM1_WEIGHT = 1
    GEMM1_OUTPUT = 2
    GEMM2_INPUT = 3
    GEMM2_WEIGHT = 4
    GEMM2_OUTPUT = 5
    GEMM3_INPUT = 6
    GEMM3_WEIGHT = 7
    GEMM3_OUTPUT = 8


class _BackwardTensors(enum.IntEnum):
    GRAD_OUTPUT1 = 0
    GRAD_INPUT1 = 1
    GRAD_OUTPUT2 = 2
    GRAD_INPUT2 = 3
    GRAD_OUTPUT3 = 4
    GRAD_INPUT3 = 5


class _Extension(ModuleType):
    """The module transformer_engine_torch."""

    FP8FwdTensors, FP8BwdTensors = _ForwardTensors, _BackwardTensors

    def __init__(self, note: Note) -> None:
        super().__init__(EXTENSION)
        self._note = note
        # `from transformer_engine_torch import *` takes what the module itself holds.
        self.__dict__.update({name: getattr(self, name) for name in vars(_Extension) if not name.startswith("_")})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name[0].isupper():
            value: Any = _Names(name, (), {})
        elif name.startswith("multi_tensor_"):
            value = self._multi_tensor(name)
        else:
            value = _refuse(name)
        setattr(self, name, value)
        return value

    def _check(self, name: str, *tensors: Any) -> None:
        for x in tensors:
            if isinstance(x, Tensor) and not isinstance(x, FakeTensor):
                self._note(Kind.MIXED_DEVICES, f"{name}, {list(x.shape)}")
                raise RuntimeError(f"{name}: a tensor of the host, {list(x.shape)}")

    def get_num_cublas_streams(self) -> int:
        return 4

    def get_cudnn_version(self) -> int:
        return 92000

    def get_cublasLt_version(self) -> int:
        return 130100

    def ubuf_built_with_mpi(self) -> bool:
        return False

    def generic_gemm(
        self,
        a: Tensor,
        transposed_a: bool,
        b: Tensor,
        transposed_b: bool,
        out: Tensor | None,
        *rest: Any,
        **kwargs: Any,
    ) -> Any:
        """Multiply column-major matrices, which in rows is b times a."""
        _, out_dtype, bias, _, _, _, grad, _, _, accumulate, *_ = rest
        self._check("generic_gemm", a, b, out, bias)
        rows_a, rows_b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
        product = torch.mm(rows_b.t() if transposed_b else rows_b, rows_a.t() if transposed_a else rows_a)
        if not transposed_b:
            product = product.view(*b.shape[:-1], product.shape[-1])
        if out is not None:
            assert out.shape == product.shape, (out.shape, product.shape)
            out.add_(product) if accumulate else out.copy_(product)
            product = out
        elif isinstance(out_dtype, str):
            product = product.to(_DTYPES[out_dtype])
        return product, torch.empty_like(bias) if bias is not None and grad else None, None, None

    def rmsnorm_fwd(self, x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, None, Tensor]:
        self._check("rmsnorm_fwd", x, weight)
        return torch.empty_like(x), None, x.new_empty(x.shape[0], dtype=torch.float32)

    def rmsnorm_bwd(
        self, grad: Tensor, x: Tensor, inverse: Tensor, weight: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor]:
        self._check("rmsnorm_bwd", grad, x, weight)
        return torch.empty_like(x), torch.empty_like(weight)

    def _multi_tensor(self, name: str) -> Callable[..., Any]:
        def function(chunk_size: int, flag: Tensor, lists: list[list[Tensor]], *rest: Any) -> Any:
            self._check(name, flag, *(x for tensors in lists for x in tensors))
            if name.endswith("l2norm"):
                return flag.new_empty(1, dtype=torch.float32), flag.new_empty(1, dtype=torch.float32)
            return None

        return function

    def get_fused_attn_backend(self, *args: Any) -> Any:
        return self.NVTE_Fused_Attn_Backend.NVTE_F16_arbitrary_seqlen

    def fused_attn_fwd(self, *args: Any) -> list[Tensor]:
        (layout, _, mask), (q, _, v) = args[6:9], args[13:16]
        self._check("fused_attn_fwd", *args)
        logger.debug("attention: %s %s %s", layout, mask, list(q.shape))
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        statistics = q.new_empty(q.shape[:-1], dtype=torch.float32)
        return [out, statistics.unsqueeze(-1), q.new_empty(2, dtype=torch.int64)]

    def fused_attn_bwd(self, *args: Any) -> list[Tensor | None]:
        self._check("fused_attn_bwd", *args)
        return [*(torch.empty_like(x) for x in args[13:16]), None, None]


_DTYPES = {"DType.kBFloat16": torch.bfloat16, "DType.kFloat32": torch.float32, "DType.kFloat16": torch.float16}


def _refuse(name: str) -> Callable[..., Any]:
    def function(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"the stand-in for Transformer Engine has no {name}")

    return function
