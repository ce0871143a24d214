"""Prompts from the command line and from files, checked before a model is built."""

from collections.abc import Sequence
from pathlib import Path

from megatron_sse.config import ModelConfig
from megatron_sse.errors import UserError
from megatron_sse.pretrained.chat import Chat, user_says
from megatron_sse.pretrained.text import Tokenizer


def read_prompts(
    texts: Sequence[str], files: Sequence[str], tokenizer: Tokenizer, continues: bool, chat: Chat | None = None
) -> list[list[int]]:
    """Return the tokens of the given texts and of text files, one prompt each.

    continues: whether they continue what a cache holds; then they may be empty. chat: renders each as what a user says
    first; None to take the texts as they are. Raises UserError.
    """
    named = [(f"--prompt {number}", text) for number, text in enumerate(texts, 1)]
    for file in files:
        try:
            named.append((f"--prompt-file {file}", Path(file).read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompt-file: {file} cannot be read ({' '.join(str(error).split())})") from None
    return encode_prompts(named, tokenizer, continues, chat)


def encode_prompts(
    named: Sequence[tuple[str, str]], tokenizer: Tokenizer, continues: bool, chat: Chat | None = None
) -> list[list[int]]:
    """Return the tokens of texts with their names; with `chat`, of what a user says. Otherwise like read_prompts."""
    prompts = []
    for name, text in named:
        prompt = tokenizer.encode(text, continues) if chat is None else chat.encode([user_says(text)])
        _check_not_empty(name, prompt, continues)
        prompts.append(prompt)
    return prompts


def read_tokens(file: str, vocab_size: int, continues: bool) -> list[list[int]]:
    """Return the prompts of a file of token ids, one per line; otherwise like read_prompts."""
    try:
        lines = Path(file).read_text(encoding="ascii").splitlines()
        prompts = [[int(word) for word in line.split()] for line in lines]
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--tokens: {file} cannot be read as lines of token ids ({reason})") from None
    if not prompts:
        raise UserError(f"--tokens: got {file}, which is empty, allowed a line of token ids for each prompt")
    for number, prompt in enumerate(prompts, 1):
        _check_not_empty(f"--tokens: {file}:{number}", prompt, continues)
        check_tokens(f"--tokens: {file}:{number}", prompt, vocab_size)
    return prompts


def check_tokens(name: str, prompt: Sequence[int], vocab_size: int) -> None:
    """Raise UserError for a token that the model does not have."""
    for token in (min(prompt), max(prompt)) if prompt else ():
        if not 0 <= token < vocab_size:
            raise UserError(f"{name}: got token {token}, allowed 0 to {vocab_size - 1}")


def check_length(model: ModelConfig, trained_length: int, num_tokens: int, given: str) -> None:
    """Raise UserError where a sequence would reach positions that softmax layers have never seen.

    given: the option, and what was got.
    """
    softmax = model.softmax
    if "softmax" not in model.layer_kinds() or not softmax.rotary_base or softmax.window is not None:
        return
    if num_tokens > trained_length:
        raise UserError(
            f"{given}, allowed {trained_length}, the length (data.sequence_length) that the softmax layers' positions "
            "were trained for; --any-length allows it"
        )


def _check_not_empty(name: str, prompt: Sequence[int], continues: bool) -> None:
    if not prompt and not continues:
        raise UserError(f"{name}: got an empty prompt, allowed at least one token")
