"""A megatron-sse model for transformers: AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)."""

from typing import Any

from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .network_megatron_sse import Network, State


class MegatronSSEConfig(PretrainedConfig):
    """model: the model's settings, as in the YAML files of megatron-sse, with the kind of every layer in `layers`."""

    model_type = "megatron_sse"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(self, model: Any = None, use_cache: bool = True, **kwargs: Any):
        self.model, self.use_cache = model, use_cache
        super().__init__(**kwargs)


class MegatronSSEForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = MegatronSSEConfig
    base_model_prefix = "model"
    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}
    # Decays are exponentials of exponentials of these; the router picks in fp32.
    _keep_in_fp32_modules_strict = ["A_log", "dt_bias", "attn.e_proj"]
    _no_split_modules = ["Block"]
    _is_stateful = True

    def __init__(self, config: MegatronSSEConfig):
        super().__init__(config)
        self.model = Network(config.model)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embeddings = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # What layers keep are states, not keys and values.
        return False

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: State | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **unused: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits and, given labels, the loss.

        attention_mask: 0 for padding, which has to be on the left where generation continues.
        labels: as input_ids, -100 for tokens that do not count; the loss is the mean over the next tokens that do.
        """
        if inputs_embeds is None:
            inputs_embeds = self.model.embeddings(input_ids)
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = State(len(self.model.layers))
        real = None if attention_mask is None else attention_mask.bool()
        hidden = self.model(inputs_embeds, real, past_key_values)
        logits = self.lm_head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)  # type: ignore[arg-type]

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        past_key_values: State | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = True,
        **unused: Any,
    ) -> dict[str, Any]:
        """Return the tokens that the state has not seen."""
        inputs: dict[str, Any] = {"past_key_values": past_key_values, "use_cache": use_cache}
        if inputs_embeds is not None and past_key_values is None:
            inputs["inputs_embeds"] = inputs_embeds
        else:
            num_seen = 0 if past_key_values is None else past_key_values.num_tokens
            num_new = 1 if inputs_embeds is not None else input_ids.shape[1] - num_seen
            inputs["input_ids"] = input_ids[:, -num_new:]
        return inputs | {"attention_mask": attention_mask}

    def _reorder_cache(self, past_key_values: State, beam_idx: Tensor) -> State:
        past_key_values.reorder_cache(beam_idx)
        return past_key_values
