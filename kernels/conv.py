"""Short causal depthwise convolution that does not look past a document's start."""

from torch import Tensor
from torch.nn.functional import pad

from megatron_sse.kernels.backend import use_triton


def short_convolution(x_TC: Tensor, weight_CW: Tensor, position_T: Tensor) -> Tensor:
    """y[t] = sum_w weight[:, W - 1 - w] x[t - w] over the W last tokens of t's own document.

    Args:
        x_TC: T tokens, C channels.
        weight_CW: the last column multiplies the token itself.
        position_T: int64, each token's position in its document.
    """
    if use_triton(x_TC):
        from megatron_sse.kernels.triton.conv import short_convolution as run

        return run(x_TC, weight_CW, position_T)
    width = weight_CW.shape[-1]
    y_TC = x_TC * weight_CW[:, -1]
    for back in range(1, width):
        earlier_TC = pad(x_TC, (0, 0, back, 0))[: x_TC.shape[0]]
        y_TC = y_TC + (earlier_TC * weight_CW[:, -1 - back]).masked_fill((position_T < back)[:, None], 0)
    return y_TC
