"""Arithmetic on one device: tensors in, tensors out."""

if __name__ == "kernels":
    # Found from the checkout's folder, which Python puts on its path. Stay empty: a second copy of these modules would
    # have second classes, and transformers looks for a package of this name from Hugging Face.
    __path__ = []

    def __getattr__(name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError(
            f"{__file__} is megatron_sse.kernels, not Hugging Face's package kernels: import megatron_sse.kernels, "
            "or start Python in another folder"
        )

else:
    from megatron_sse.kernels.banks import BankInputs, BankOutputs
    from megatron_sse.kernels.conv import short_convolution
    from megatron_sse.kernels.norm import gated_norm
    from megatron_sse.kernels.routing import Routes, join_routes, route
    from megatron_sse.kernels.segments import Edges
    from megatron_sse.kernels.sse import sse_attention

__all__ = [
    "BankInputs",
    "BankOutputs",
    "Edges",
    "Routes",
    "gated_norm",
    "join_routes",
    "route",
    "short_convolution",
    "sse_attention",
]
