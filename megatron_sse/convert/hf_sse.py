"""SSE models in the Hugging Face layout of the authors' code, as whole weights under this project's names."""

import torch
from torch import Tensor

from megatron_sse.config import SSEConfig

# Per layer: our name, theirs.
_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "pre_mlp_layernorm.weight": "mlp_norm.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}
_MIXER = {
    "norm_weight": "o_norm.weight",
    "out_proj.weight": "o_proj.weight",
    "router.proj.weight": "e_proj.weight",
    "query_lora.down.weight": "lora_q_proj.0.weight",
    "query_lora.up.weight": "lora_q_proj.1.weight",
    "key_lora.down.weight": "lora_k_proj.0.weight",
    "key_lora.up.weight": "lora_k_proj.1.weight",
    "output_gate.down.weight": "g_proj.0.weight",
    "output_gate.up.weight": "g_proj.1.weight",
    "decay_gates.0.down.weight": "gk_proj.0.0.weight",
    "decay_gates.0.up.weight": "gk_proj.0.1.weight",
    "decay_gates.0.up.bias": "gk_proj.0.1.bias",
    "decay_gates.1.down.weight": "gk_proj.1.0.weight",
    "decay_gates.1.up.weight": "gk_proj.1.1.weight",
    "decay_gates.1.up.bias": "gk_proj.1.1.bias",
}


def mixer_from_hf(theirs: dict[str, Tensor], settings: SSEConfig) -> dict[str, Tensor]:
    """One layer's mixer. theirs: the layer's attention weights by name ("q_proj.weight", ...)."""
    ours = {name: theirs[source] for name, source in _MIXER.items() if source in theirs}
    num_heads, group = settings.num_heads, settings.num_value_heads // settings.num_heads
    by_head = [theirs[f"{part}_proj.weight"].unflatten(0, (num_heads, -1)) for part in "qkv"]
    if "A_log" in theirs:
        # Theirs: [all shared heads | all sparse heads]. Ours: per value head decay and write strength, shared | sparse.
        scalars = [theirs[f"{part}_proj.weight"].unflatten(0, (2, num_heads, group)) for part in "ab"]
        by_head.append(torch.stack(scalars).permute(2, 3, 0, 1, 4).flatten(1, 3))
        for name in ("A_log", "dt_bias"):
            ours[name] = theirs[name].view(2, -1).t().contiguous()
    ours["in_proj.weight"] = torch.cat(by_head, dim=1).flatten(0, 1)
    if "q_conv1d_shared.weight" in theirs:
        convs = [theirs[f"{part}_conv1d_shared.weight"].squeeze(1).unflatten(0, (num_heads, -1)) for part in "qk"]
        ours["conv_weight"] = torch.stack(convs, dim=1)
    return ours


def model_from_hf(theirs: dict[str, Tensor], settings: SSEConfig, num_layers: int) -> dict[str, Tensor]:
    """A whole model without softmax layers."""
    ours = {
        "embedding.word_embeddings.weight": theirs["model.embeddings.weight"],
        "decoder.final_layernorm.weight": theirs["model.norm.weight"],
        "output_layer.weight": theirs["lm_head.weight"],
    }
    for layer in range(num_layers):
        source, target = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        ours |= {target + name: theirs[source + theirs_name] for name, theirs_name in _LAYER.items()}
        gate_up = [theirs[f"{source}mlp.{part}_proj.weight"] for part in ("gate", "up")]
        ours[target + "mlp.linear_fc1.weight"] = torch.cat(gate_up)
        prefix = source + "attn."
        attention = {name.removeprefix(prefix): value for name, value in theirs.items() if name.startswith(prefix)}
        ours |= {f"{target}self_attention.{name}": v for name, v in mixer_from_hf(attention, settings).items()}
    return ours
