"""Short causal depthwise convolution that does not look past a document's start."""

from torch import Tensor
from torch.nn.functional import pad

from megatron_sse.kernels.backend import use_triton


def short_convolution(x_Tc: Tensor, weight_cW: Tensor, position_T: Tensor) -> Tensor:
    """Return y[t] = sum_w weight[:, W - 1 - w] x[t - w] over the W last tokens of t's own document.

    Args:
        x_Tc: T tokens, c channels.
        weight_cW: the last column multiplies the token itself.
        position_T: int64, each token's position in its document.
    """
    if use_triton(x_Tc):
        from megatron_sse.kernels.triton.conv import short_convolution as run

        return run(x_Tc, weight_cW, position_T)
    width = weight_cW.shape[-1]
    y_Tc = x_Tc * weight_cW[:, -1]
    for back in range(1, width):
        # Row t is token t - back; where that is a token of another document, it does not count.
        earlier_Tc = pad(x_Tc, (0, 0, back, 0))[: x_Tc.shape[0]]
        y_Tc = y_Tc + (earlier_Tc * weight_cW[:, -1 - back]).masked_fill((position_T < back)[:, None], 0)
    return y_Tc
