"""Everything that crosses ranks: device, process groups, who holds which tokens."""

import warnings

# What Megatron-Core is known to say in every process although nothing is wrong; it would bury the warnings that count.
for _message in (
    # The start-up banner says once what was picked instead.
    "(Transformer Engine and )?Apex (is|are) not installed",
    # Its own default, whatever the configuration says.
    "full scope is deprecated",
    # Names that Megatron-Core has to keep for older releases of torch.
    "`torch.distributed.(reduce_scatter_tensor|all_gather_into_tensor)` is deprecated",
    # The distributed optimizer's fp32 shards are views of the parameters.
    "The .grad attribute of a Tensor that is not a leaf Tensor is being accessed",
):
    warnings.filterwarnings("ignore", message=_message)
