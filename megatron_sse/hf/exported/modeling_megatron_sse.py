"""A megatron-sse model for transformers: AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import logging

from .cache_megatron_sse import CACHE, CACHE_NAMES, MegatronSSECache, one_cache
from .network_megatron_sse import Block, RMSNorm, run_banks
from .settings_megatron_sse import DERIVED, SHARED, complete_settings, derived_settings, split_settings
from .tokens_megatron_sse import Tokens, make_tokens

logger = logging.get_logger(__name__)


class MegatronSSEConfig(PretrainedConfig):
    """The settings of a model.

    model: those of the YAML files of megatron-sse that transformers has no name for, with the kind of every layer in
        `layers`. Sizes that follow from it (num_hidden_layers, head_dim, ...) can be read here, not set.
    megatron_sse_kernels: whether the package's kernels run the recurrences where it is installed.
    """

    model_type = "megatron_sse"
    keys_to_ignore_at_inference = [*CACHE_NAMES]

    def __init__(
        self,
        model: dict[str, Any] | None = None,
        vocab_size: int | None = None,
        hidden_size: int | None = None,
        intermediate_size: int | None = None,
        initializer_range: float | None = None,
        tie_word_embeddings: bool = False,
        max_position_embeddings: int | None = None,
        use_cache: bool = True,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        megatron_sse_kernels: bool = True,
        **kwargs: Any,
    ):
        self.vocab_size, self.hidden_size, self.intermediate_size = vocab_size, hidden_size, intermediate_size
        self.initializer_range, self.tie_word_embeddings = initializer_range, tie_word_embeddings
        self.max_position_embeddings, self.use_cache = max_position_embeddings, use_cache
        self.pad_token_id, self.bos_token_id, self.eos_token_id = pad_token_id, bos_token_id, eos_token_id
        self.megatron_sse_kernels = megatron_sse_kernels
        self.model = model
        written = {name: kwargs.pop(name) for name in DERIVED if name in kwargs}
        if model is not None:
            # Earlier exports have some settings twice.
            for name, value in split_settings(complete_settings(written | vars(self))).items():
                setattr(self, name, value)
        super().__init__(**kwargs)

    def complete_settings(self) -> dict[str, Any]:
        """Return all settings of the model by our names."""
        return complete_settings({name: getattr(self, name) for name in (*SHARED, "model")})

    def _derived(self, name: str) -> Any:
        return None if self.model is None else derived_settings(self.model)[name]

    num_hidden_layers = property(lambda self: self._derived("num_hidden_layers"))
    num_attention_heads = property(lambda self: self._derived("num_attention_heads"))
    num_key_value_heads = property(lambda self: self._derived("num_key_value_heads"))
    head_dim = property(lambda self: self._derived("head_dim"))


class MegatronSSELayer(GradientCheckpointingLayer, Block):
    """A layer that computes itself again in backward where gradient checkpointing is on."""


class MegatronSSEPreTrainedModel(PreTrainedModel):
    config_class = MegatronSSEConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    # Decays are exponentials of exponentials of these; the router picks in fp32.
    _keep_in_fp32_modules_strict = ["A_log", "dt_bias", "attn.e_proj"]
    _no_split_modules = ["MegatronSSELayer"]
    _skip_keys_device_placement = [*CACHE_NAMES]
    _supports_sdpa = True

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        if attn_implementation not in (None, "sdpa"):
            raise ValueError(
                f"attn_implementation: got {attn_implementation!r}, allowed 'sdpa': softmax layers run torch's "
                "scaled_dot_product_attention, which chooses a flash kernel by itself"
            )
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)


class MegatronSSEModel(MegatronSSEPreTrainedModel):
    """All but the output projection."""

    def __init__(self, config: MegatronSSEConfig):
        super().__init__(config)
        settings = config.complete_settings()
        self.embeddings = nn.Embedding(settings["vocab_size"], settings["hidden_size"])
        self.layers = nn.ModuleList(MegatronSSELayer(settings, kind) for kind in settings["layers"])
        self.norm = RMSNorm(settings["hidden_size"], settings["norm_epsilon"])
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings = value  # type: ignore[assignment]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: MegatronSSECache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        seq_idx: Tensor | None = None,
        is_causal: bool | None = None,
        cache: MegatronSSECache | None = None,
    ) -> BaseModelOutputWithPast | tuple:
        """Return the hidden states of the last layer.

        Args:
            input_ids: [B, L], or inputs_embeds [B, L, d].
            attention_mask: 0 for padding, anywhere; [B, tokens so far and these], of which only these are read.
            position_ids: for the rotary positions of softmax layers, [B or 1, L]. Where they do not go on by one, a
                document starts: several can be packed in a row, and each is computed as if it were alone.
            past_key_values, cache: what an earlier call returned, or make_cache(); changed to include these tokens. The
                second name is that of newer versions of transformers.
            use_cache: whether to return a cache; by default as in the configuration, and not in training.
            cache_position: the numbers of these tokens; they can only be the next ones.
            cu_seq_lens_q, cu_seq_lens_k, seq_idx: where packed documents start, as in transformers' collators, next to
                position_ids or instead of them.
            max_length_q, max_length_k: accepted beside them, since they follow from them.

        Raises ValueError for arguments that the model cannot honour: output_attentions and is_causal=False.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids, inputs_embeds: got both or none, allowed one of them")
        with_hidden = self._check_outputs(output_attentions, output_hidden_states, is_causal)
        x_BLd = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        cache = self._choose_cache(one_cache(past_key_values, cache), use_cache)
        tokens = self._read_tokens(
            x_BLd, cache, attention_mask, position_ids, cache_position, (cu_seq_lens_q, cu_seq_lens_k), seq_idx
        )
        real_BL = tokens.real_BL()
        if real_BL is not None:
            # What the embeddings of padding hold, which may be anything, takes no part.
            x_BLd = x_BLd.masked_fill(~real_BL[..., None], 0)
        hidden_states, kept = [], []
        for number, layer in enumerate(self.layers):
            if with_hidden:
                hidden_states.append(x_BLd)
            before = () if cache is None else cache.kept[number].tensors
            x_BLd, of_layer = layer(x_BLd, tokens, before, cache is not None)
            kept.append(of_layer)
        x_BLd = self.norm(x_BLd)
        if cache is not None:
            cache.store(kept, tokens.num_before + x_BLd.shape[1], tokens.document_BR)
        cache_by_name: dict[str, Any] = {CACHE: cache}
        output = BaseModelOutputWithPast(
            last_hidden_state=x_BLd,
            hidden_states=(*hidden_states, x_BLd) if with_hidden else None,
            **cache_by_name,
        )
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _check_outputs(
        self, output_attentions: bool | None, output_hidden_states: bool | None, is_causal: bool | None
    ) -> bool:
        """Return whether hidden states are wanted. Raises ValueError for what the model cannot give."""
        if output_attentions or self.config.output_attentions:
            raise ValueError("output_attentions: got True, allowed False: attention is computed without its weights")
        if is_causal is False:
            raise ValueError("is_causal: got False, allowed True: every layer is causal")
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        if not isinstance(wanted, bool):
            raise ValueError(f"output_hidden_states: got {wanted!r}, allowed True and False")
        return wanted

    def _choose_cache(self, given: MegatronSSECache | None, use_cache: bool | None) -> MegatronSSECache | None:
        if given is not None and not isinstance(given, MegatronSSECache):
            raise ValueError(
                f"past_key_values: got a {type(given).__name__}, allowed what the model returned or its make_cache()"
            )
        if self.gradient_checkpointing and self.training and (use_cache or given is not None):
            if given is not None:
                raise ValueError("past_key_values: got a cache, allowed None in training with gradient checkpointing")
            logger.warning_once("use_cache=True does not go with gradient checkpointing; no cache is returned")
            return None
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        return self.make_cache() if use_cache and given is None else given

    def make_cache(self) -> MegatronSSECache:
        """Return an empty cache, for past_key_values."""
        return MegatronSSECache(len(self.layers))

    def _read_tokens(
        self,
        x_BLd: Tensor,
        cache: MegatronSSECache | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache_position: Tensor | None,
        cu_seq_lens: tuple[Tensor | None, Tensor | None],
        seq_idx: Tensor | None,
    ) -> Tokens:
        """Check the arguments that say what the tokens are, and return what the layers need to know."""
        (batch_size, length, _), num_before = x_BLd.shape, 0 if cache is None else cache.num_tokens
        device, compiling = x_BLd.device, torch.compiler.is_compiling()
        for name, given, shapes in (
            ("attention_mask", attention_mask, [(batch_size, num_before + length)]),
            ("position_ids", position_ids, [(batch_size, length), (1, length)]),
            ("cache_position", cache_position, [(length,)]),
            ("seq_idx", seq_idx, [(batch_size, length)]),
        ):
            if given is not None and tuple(given.shape) not in shapes:
                raise ValueError(f"{name}: got shape {tuple(given.shape)}, allowed {' or '.join(map(str, shapes))}")
        if cache_position is not None and not compiling and int(cache_position[0]) != num_before:
            raise ValueError(
                f"cache_position: got {int(cache_position[0])} as the first, allowed {num_before}: the next"
            )
        start_BL = None
        if seq_idx is not None:
            start_BL = nn.functional.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
        for offsets in cu_seq_lens:
            if offsets is None:
                continue
            if batch_size != 1:
                raise ValueError(f"cu_seq_lens_q: got {batch_size} sequences, allowed one that holds all documents")
            starts = torch.zeros(1, length + 1, dtype=torch.bool, device=device)
            starts = starts.index_fill(1, offsets.to(device, torch.int64), True)[:, :length]
            start_BL = starts if start_BL is None else start_BL | starts
        if start_BL is not None and (attention_mask is not None or num_before):
            raise ValueError("cu_seq_lens_q, seq_idx: allowed without attention_mask and without earlier tokens")
        return make_tokens(
            x_BLd,
            num_before,
            None if cache is None else cache.document_BR,
            None if attention_mask is None else attention_mask[:, num_before:].to(device).bool(),
            position_ids,
            start_BL,
            # torch.compile makes one graph of the torch form; it would not look into the kernels.
            with_flat=self.config.megatron_sse_kernels and run_banks is not None and length > 1 and not compiling,
        )


class MegatronSSEForCausalLM(MegatronSSEPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}
    # Generated tokens cannot be taken back.
    _is_stateful = True
    # The loss takes num_items_in_batch.
    accepts_loss_kwargs = True

    def __init__(self, config: MegatronSSEConfig):
        super().__init__(config)
        self.model = MegatronSSEModel(config)
        self.lm_head = nn.Linear(self.model.embeddings.embedding_dim, self.model.embeddings.num_embeddings, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embeddings = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: MegatronSSECache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        shift_labels: Tensor | None = None,
        output_router_logits: bool | None = None,
        return_dict: bool | None = None,
        cache: MegatronSSECache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Return logits and, given labels, the loss.

        Args:
            labels: as input_ids, -100 for tokens that do not count; shift_labels: those of the next tokens instead. The
                loss is the sum over labels divided by num_items_in_batch, by default their number: the mean.
            logits_to_keep: of how many last tokens logits are computed, 0 for all; or the columns of the tokens.
            kwargs: those of MegatronSSEModel.forward, which raises TypeError for others.
        """
        if output_router_logits:
            raise ValueError(
                "output_router_logits: got True, allowed False: only megatron-sse train has the balance loss"
            )
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=one_cache(past_key_values, cache),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        columns = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, columns])
        loss = None
        if labels is not None or shift_labels is not None:
            if logits.shape[1] != outputs.last_hidden_state.shape[1] and shift_labels is None:
                raise ValueError("logits_to_keep: allowed 0 with labels; a loss needs the logits of all tokens")
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
                shift_labels=shift_labels,
            )
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            **{CACHE: getattr(outputs, CACHE)},
        )
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def prepare_inputs_for_generation(
        self, *args: Any, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Return the arguments of forward for the next tokens. inputs_embeds: named, as transformers looks for it."""
        # generate() passes on the tokenizers that it needs for stop_strings; forward would refuse them.
        for name in ("tokenizer", "assistant_tokenizer"):
            kwargs.pop(name, None)
        return super().prepare_inputs_for_generation(*args, inputs_embeds=inputs_embeds, **kwargs)  # type: ignore[misc]

    def make_cache(self) -> MegatronSSECache:
        """Return an empty cache, for past_key_values of forward and generate."""
        return self.model.make_cache()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # What layers keep are states, not keys and values.
        return False

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation: got {generation_config.cache_implementation!r}, allowed None: the model has a "
                "cache of its own"
            )
        given = one_cache(*(model_kwargs.pop(name, None) for name in CACHE_NAMES))
        if given is not None:
            model_kwargs[CACHE] = given
        if generation_config.use_cache is not False and given is None:
            model_kwargs[CACHE] = self.make_cache()
            return
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]
