"""The command `megatron-sse generate`: text from a model, printed as it is generated."""

import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_sse.config import RunConfig
from megatron_sse.errors import UserError, found_by_all
from megatron_sse.inference.cache import Cache, read_cache
from megatron_sse.inference.captured import CapturedSteps
from megatron_sse.inference.prompts import check_length, check_tokens, read_prompts, read_tokens
from megatron_sse.inference.request import Request
from megatron_sse.inference.run import generate
from megatron_sse.inference.sampling import Sampler
from megatron_sse.model.language_model import LanguageModel
from megatron_sse.parallel.device import Device, setup_device
from megatron_sse.parallel.sharding import ContextShard
from megatron_sse.pretrained.chat import Chat, Message, assistant_says, open_chat, user_says
from megatron_sse.pretrained.network import build_and_load, inference_config, inference_groups
from megatron_sse.pretrained.open import Model, open_model
from megatron_sse.pretrained.text import Tokenizer, open_tokenizer
from megatron_sse.visible import count_of, make_visible

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Job:
    """A request whose files have been read and found to fit.

    tokenizer: None where token ids are read and printed. chat: None where texts are continued as they are.
    kept: the content of a saved cache.
    """

    model: Model
    config: RunConfig
    tokenizer: Tokenizer | None
    chat: Chat | None
    prompts: list[list[int]]
    kept: dict[str, Any] | None


def run(request: Request) -> int:
    """Generate and print; returns the exit status. Raises UserError.

    The processes are `context` tensor groups.
    """
    with found_by_all():
        job = _prepare(request)
    with inference_groups(request.tensor_size, request.context) as (groups, device):
        net = build_and_load(job.model, job.config, groups, device)
        cache = Cache(net, len(job.prompts) or 1) if job.kept is None else Cache.restore(job.kept, net)
        shard = ContextShard(groups.cp.rank(), groups.cp.size())
        session = _Session(request, job, net, device, shard)
        if request.is_interactive:
            cache = session.talk(cache, sys.stdin, sys.stdin.isatty())
        else:
            session.answer(cache, job.prompts)
        if request.save_cache is not None:
            cache.save(request.save_cache, _settings(job.config))
    return 0


def _prepare(request: Request) -> _Job:
    request.check()
    if request.cuda_graph and setup_device(0).type != "cuda":
        raise UserError("--cuda-graph: got a machine without a GPU, allowed with one; leave it out")
    model = open_model("CHECKPOINT", request.checkpoint)
    config = inference_config(model, request.precision, request.tensor_size)
    vocab_size, continues = config.model.vocab_size, request.load_cache is not None
    instead = ", or give token ids with --tokens"
    tokenizer = None if request.tokens is not None else open_tokenizer(model, instead)
    chat = open_chat(model, tokenizer) if request.chat and tokenizer is not None else None
    if request.tokens is not None:
        prompts = read_tokens(request.tokens, vocab_size, continues)
    else:
        assert tokenizer is not None
        prompts = read_prompts(request.prompts, request.prompt_files, tokenizer, continues, chat)
        for number, prompt in enumerate(prompts, 1):
            check_tokens(f"prompt {number}", prompt, vocab_size)
    kept = None if request.load_cache is None else read_cache(request.load_cache, _settings(config))
    num_sequences = 1 if request.is_interactive else len(prompts)
    before = [0] * num_sequences if kept is None else kept["lengths"]
    if len(before) != num_sequences:
        raise UserError(f"--load-cache: got {num_sequences} prompts, allowed {len(before)}, one for each sequence")
    for prompt, num_before in zip(prompts, before, strict=False):
        _check_length(request, config, num_before + len(prompt))
    return _Job(model, config, tokenizer, chat, prompts, kept)


def _settings(config: RunConfig) -> dict:
    return config.model.model_dump(mode="json") | {"precision": config.training.precision}


def _check_length(request: Request, config: RunConfig, num_before: int) -> None:
    if not request.any_length:
        num_tokens = num_before + request.max_tokens
        given = f"--max-tokens: got sequences of {num_tokens} tokens with their prompts"
        check_length(config.model, config.data.sequence_length, num_tokens, given)


class _Session:
    """A loaded model, and how its tokens are picked and printed."""

    def __init__(self, request: Request, job: _Job, net: LanguageModel, device: Device, shard: ContextShard):
        self.request, self.config, self.net, self.device, self.shard = request, job.config, net, device, shard
        self.tokenizer, self.chat = job.tokenizer, job.chat
        teller = self.chat or self.tokenizer
        self.end = None if teller is None else teller.end
        self.sampler = Sampler(self.config.model.vocab_size, request.temperature, request.top_p, request.seed)

    def answer(self, cache: Cache, prompts: Sequence[Sequence[int]]) -> list[str]:
        """Print what follows the prompts, one sequence token by token, several at the end; return it."""
        decoders = [self._decoder() for _ in prompts]
        texts = [""] * len(prompts)
        start = first = time.perf_counter()
        num_tokens = 0
        request = self.request
        step = CapturedSteps(self.net, cache) if request.cuda_graph else None
        for tokens in generate(
            self.net, cache, prompts, request.max_tokens, self.sampler, self.end, request.chunk, self.shard, step
        ):
            if not num_tokens:
                first = time.perf_counter()
            for place, token in enumerate(tokens):
                if token is None or token == self.end:
                    continue
                text = decoders[place](token)
                texts[place] += text
                if len(prompts) == 1:
                    _show(text)
            num_tokens += sum(token is not None for token in tokens)
        if len(prompts) == 1:
            _show("\n")
        else:
            for number, text in enumerate(texts, 1):
                _show(f"{text}\n" if self.tokenizer is None else f"--- {number}\n{text}\n")
        if not request.is_interactive:
            self._report(sum(map(len, prompts)), first - start, num_tokens, time.perf_counter() - first, cache)
        return texts

    def talk(self, cache: Cache, lines: Iterable[str], is_terminal: bool) -> Cache:
        """Continue after each line; lines and answers are one sequence until the model ends it. Return its cache.

        With --chat each line is the user's next turn.
        """
        assert self.tokenizer is not None
        said: list[Message] = []
        for line in _prompted(lines, is_terminal):
            if self.chat is not None:
                self._converse(self.chat, said, line.rstrip("\n"))
                continue
            if cache.pending[0] and cache.pending[0][-1] == self.end:
                cache = Cache(self.net, 1)
            text = line.rstrip("\n")
            prompt = self.tokenizer.encode(text, continues=bool(cache.lengths[0])) if text else []
            if not prompt and not cache.pending[0]:
                print("empty prompt: give at least one character", file=sys.stderr)
                continue
            try:
                _check_length(self.request, self.config, cache.lengths[0] + len(prompt))
            except UserError as error:
                print(error, file=sys.stderr)
                continue
            self.answer(cache, [prompt])
        return cache

    def _converse(self, chat: Chat, said: list[Message], line: str) -> None:
        """Answer the user's next turn. The conversation is read anew, since a template may change what came before."""
        said.append(user_says(line))
        try:
            prompt = chat.encode(said)
            _check_length(self.request, self.config, len(prompt))
        except UserError as error:
            print(error, file=sys.stderr)
            said.pop()
            return
        [text] = self.answer(Cache(self.net, 1), [prompt])
        # A model writes how the template ends a turn, and the template would write it again.
        said.append(assistant_says(text.removesuffix(chat.closing)))

    def _decoder(self) -> Callable[[int], str]:
        return (lambda token: f"{token} ") if self.tokenizer is None else self.tokenizer.stream()

    def _report(self, num_before: int, before: float, num_tokens: int, after: float, cache: Cache) -> None:
        # The first token follows from the prompt's logits.
        each = after / max(num_tokens - 1, 1) * 1e3
        logger.info(
            "prompts: %s in %.2f s (%.1f a second); new: %s, %.1f ms each; cache %.3f MB; peak memory %.0f MB",
            *(count_of(num_before, "token"), before, num_before / max(before, 1e-9)),
            *(count_of(num_tokens, "token"), each),
            *(cache.num_bytes / 1e6, self.device.peak_memory_bytes() / 1e6),
        )


def _prompted(lines: Iterable[str], is_terminal: bool) -> Iterator[str]:
    """Yield lines; on a terminal say before the first how to end, and show a sign before each."""
    lines = iter(lines)
    if is_terminal:
        print("Each line is a prompt. Ctrl-D ends.", file=sys.stderr)
    while True:
        if is_terminal:
            print("> ", end="", file=sys.stderr, flush=True)
        line = next(lines, None)
        if line is None:
            return
        yield line


def _show(text: str) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        sys.stdout.write(make_visible(text))
        sys.stdout.flush()
