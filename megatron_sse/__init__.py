"""Training of long-context language models whose attention is replaced by SSE layers, on Megatron-Core.

Tensor names end with their dims, outermost first, one letter each; shapes in docstrings use the same letters.

    A  banks of a layer, A = 1 + N: the shared one and the partitions
    B  batch: sequences
    C  rows of a chunk
    D  documents; on context ranks fragments of them, in generation the sequences that continue
    E  tokens of a sequence on all context ranks
    F  slots of a rank: runs of consecutive tokens of a sequence
    G  chunks: rows of one segment that are computed together
    H  heads (HV in shapes: value heads, where keys have fewer)
    K  key channels of a head
    L  tokens of a sequence on this rank; next to F, of one slot
    M  pieces: what a scan goes through, each a run of complete chunks of one segment
    N  partitions, the banks that are not shared
    P  picks of a token
    Q  queries of a block
    R  rows: of a recurrence's inputs, of a rank's hidden states, of a cache of keys and values
    S  segments: the tokens of one span and bank
    T  flat tokens, t = b * L + l
    U  units side by side that do not interact, such as banks x heads
    V  value channels of a head
    W  tokens that a convolution looks at
    X  places of a pool of cached sequences
    Y  spans: runs of tokens that one state per bank goes through
    Z  programs or blocks of a kernel's launch whose results are summed afterwards
    b  bins of a histogram
    c  channels of a convolution, or any other features
    d  hidden channels
    e  hidden channels of a teacher
    l  layers
    n  samples of a data set
    p  parts or pairs: of documents when they are packed, of recall tasks
    q  questions
    r  routers
    s  singular values
    v  vocabulary
    w  tokens whose loss or logits are wanted

A 1 is a dim of size 1 or, behind a letter, one entry more than its dim has (offsets_D1); other digits are sizes. In
formulas S is a state.
"""

import logging
import warnings
from typing import TYPE_CHECKING, Any

from megatron_sse.light_import import make_import_light

if TYPE_CHECKING:
    from megatron_sse.api import LoadedModel, RunPlan, TrainedRun, load, load_config, plan, train

__version__ = "0.1.0"
__all__ = ["LoadedModel", "RunPlan", "TrainedRun", "load", "load_config", "plan", "train"]


def __getattr__(name: str) -> Any:
    """Return a name of megatron_sse.api, which is imported when it is needed: it loads torch and Megatron-Core."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from megatron_sse import api

    return getattr(api, name)


make_import_light()

# What Megatron-Core is known to say in every process although nothing is wrong; it would bury the warnings that count.
for _message in (
    # The start-up banner says once what was picked instead.
    "(Transformer Engine and )?Apex (is|are) not installed",
    # Its own default, whatever the configuration says.
    "full scope is deprecated",
    # Each rank reads its part of a checkpoint by itself.
    "The argument order of load has been changed",
    "torch.distributed is disabled, unavailable or uninitialized, assuming the intent is to load in a single process",
    # Said on import, before any process group exists.
    "Could not determine rank from torch.distributed",
    # An import of its optimizers, which no run uses.
    "MimoModelConfig is experimental",
    # Names that Megatron-Core has to keep for older releases of torch.
    "`(torch.distributed.(reduce_scatter_tensor|all_gather_into_tensor)|load_state_dict)` is deprecated",
    # parallel/device.py sets the variable where the machine's GPUs want it, and doctor compares another value.
    "When using (sequence parallelism|async grad allreduce) it is recommended to set the environment variable",
    # The distributed optimizer's fp32 shards are views of the parameters.
    "The .grad attribute of a Tensor that is not a leaf Tensor is being accessed",
):
    warnings.filterwarnings("ignore", message=_message)


class _NotStartingWith(logging.Filter):
    """Let all records through but those whose message starts with `start`."""

    def __init__(self, start: str):
        super().__init__()
        self.start = start

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.start)


# Deprecations of Megatron-Core 0.19 that docs/megatron_core.md answers, by the module that logs them.
for _module, _message in (
    ("megatron.core.models.gpt.gpt_model", "GPTModel IS DEPRECATED"),
    ("megatron.core.dist_checkpointing.strategies.common", "load_common is deprecated"),
):
    logging.getLogger(_module).addFilter(_NotStartingWith(_message))
