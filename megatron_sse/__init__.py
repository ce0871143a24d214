"""Training of long-context language models whose attention is replaced by SSE layers, on Megatron-Core.

Tensor names carry their dims, outermost first:
B batch, L tokens of a sequence, T flat tokens (t = b * L + l), H heads, K key dim, V value dim, N partitions,
D documents, S segments (the tokens of one document and bank), C tokens of a chunk.
"""

import warnings

__version__ = "0.1.0"

# What Megatron-Core is known to say in every process although nothing is wrong; it would bury the warnings that count.
for _message in (
    # The start-up banner says once what was picked instead.
    "(Transformer Engine and )?Apex (is|are) not installed",
    # Its own default, whatever the configuration says.
    "full scope is deprecated",
    # Names that Megatron-Core has to keep for older releases of torch.
    "`(torch.distributed.(reduce_scatter_tensor|all_gather_into_tensor)|load_state_dict)` is deprecated",
    # The distributed optimizer's fp32 shards are views of the parameters.
    "The .grad attribute of a Tensor that is not a leaf Tensor is being accessed",
):
    warnings.filterwarnings("ignore", message=_message)
