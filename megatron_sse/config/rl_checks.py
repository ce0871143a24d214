"""Settings that do not fit together with those of rl."""

from megatron_sse.config.problem import Found
from megatron_sse.config.schema import Settings


def rl_problems(config: Settings) -> Found:
    """Yield what contradicts the settings of rl; nothing where a run has none."""
    rl, data, parallel = config.rl, config.data, config.parallel
    if rl is None:
        return
    if parallel.pipeline > 1:
        yield "parallel.pipeline", parallel.pipeline, "1 with rl: answers are generated without pipeline stages"
    for name in ("train", "validation", "corpus"):
        if given := getattr(data, name):
            key = f"data.{name}"
            shown = given if isinstance(given, str) else ", ".join(map(str, given))
            yield key, shown, "null with rl: rl.prompts and rl.validation_prompts take its place"
    if data.validation_share:
        yield "data.validation_share", data.validation_share, "0.0 with rl, which has rl.validation_prompts"
    if not data.reset_at_documents:
        yield "data.reset_at_documents", False, "true with rl: answers are packed as documents"
    if rl.share_prefixes and parallel.context > 1:
        yield "rl.share_prefixes", True, f"false while parallel.context is {parallel.context}: prompts stay on one rank"
    if rl.max_new_tokens >= data.sequence_length:
        allowed = f"less than data.sequence_length {data.sequence_length}, which holds a prompt and its answer"
        yield "rl.max_new_tokens", rl.max_new_tokens, allowed
    if rl.overlong_buffer > rl.max_new_tokens:
        yield "rl.overlong_buffer", rl.overlong_buffer, f"at most rl.max_new_tokens {rl.max_new_tokens}"
    if rl.kl and config.checkpoint.load_weights is None:
        yield "rl.kl", rl.kl, "0.0 while checkpoint.load_weights, which is the reference, is null"
    for name in ("hidden_dropout", "attention_dropout"):
        if given := config.model.transformer.get(name):
            yield f"model.transformer.{name}", given, "0.0 with rl: answers are generated without dropout"
    if rl.balance_loss and not config.model.sse.balance_loss:
        yield "rl.balance_loss", rl.balance_loss, "0.0 while model.sse.balance_loss is 0.0, which leaves the loss out"
