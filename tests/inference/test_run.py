"""Batches, chunks, ends of sequences, and caches that are saved and continued."""

from pathlib import Path

import pytest

from megatron_sse.errors import UserError
from megatron_sse.inference import run as run_module
from megatron_sse.inference.cache import Cache, read_cache
from megatron_sse.inference.run import generate
from megatron_sse.inference.sampling import Sampler
from megatron_sse.model.language_model import LanguageModel

PROMPTS = [[5, 6, 7], [9], list(range(40, 51))]
VOCABULARY = 257


def sample(net: LanguageModel, prompts: list[list[int]], num_tokens: int = 8, cache: Cache | None = None, **options):
    """Return the new tokens of each prompt."""
    sampler = Sampler(VOCABULARY, options.pop("temperature", 0.0), seed=options.pop("seed", 0))
    steps = list(generate(net, cache or Cache(net, len(prompts)), prompts, num_tokens, sampler, **options))
    return [[token for token in tokens if token is not None] for tokens in zip(*steps, strict=True)]


@pytest.mark.parametrize("number", [0, 1], ids=["pure", "hybrid"])
def test_a_batch_like_each_prompt_alone(nets: list[LanguageModel], number: int) -> None:
    together = sample(nets[number], PROMPTS)
    assert together == [sample(nets[number], [prompt])[0] for prompt in PROMPTS]
    assert len({tuple(tokens) for tokens in together}) == 3


@pytest.mark.parametrize("number", [0, 1], ids=["pure", "hybrid"])
def test_chunks_change_nothing(nets: list[LanguageModel], number: int) -> None:
    whole = sample(nets[number], PROMPTS, temperature=1.0)
    for chunk in (1, 4, 15):
        assert sample(nets[number], PROMPTS, temperature=1.0, chunk=chunk) == whole
    assert sample(nets[number], PROMPTS, temperature=1.0, seed=1) != whole


def test_chunks_are_bounded(nets: list[LanguageModel], monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    original = run_module.feed

    def feed(model, cache, tokens_T, places, counts):
        sizes.append(len(tokens_T))
        return original(model, cache, tokens_T, places, counts)

    monkeypatch.setattr(run_module, "feed", feed)
    cache = Cache(nets[0], 2)
    before = cache.num_bytes
    sample(nets[0], [list(range(70)), list(range(35))], 1, cache, chunk=32)
    assert sizes == [32, 32, 32, 9]
    assert cache.num_bytes == before and cache.lengths == [70, 35]


def test_steps_are_fed_as_told(nets: list[LanguageModel]) -> None:
    """Sequences that have ended are left out, as they are by default."""
    free = sample(nets[1], PROMPTS)
    fed, cache = [], Cache(nets[1], len(PROMPTS))

    def step(tokens, places):
        fed.append((tokens, places))
        return run_module.decode(nets[1], cache, tokens, places)

    end = free[2][3]
    assert sample(nets[1], PROMPTS, cache=cache, end=end, step=step) == sample(nets[1], PROMPTS, end=end)
    assert [place for place, tokens in enumerate(free) if end not in tokens[: len(fed)]] == fed[-1][1]
    assert all(end not in tokens for tokens, _ in fed)


@pytest.mark.parametrize("number", [0, 1], ids=["pure", "hybrid"])
def test_sequences_end(nets: list[LanguageModel], number: int) -> None:
    free = sample(nets[number], PROMPTS)
    end = free[2][3]
    ended = sample(nets[number], PROMPTS, end=end)
    for tokens, expected in zip(ended, free, strict=True):
        assert tokens == expected[: expected.index(end) + 1 if end in expected else None]
    assert len(ended[2]) <= 4


@pytest.mark.parametrize("number", [0, 1], ids=["pure", "hybrid"])
def test_a_saved_cache_continues(nets: list[LanguageModel], number: int, tmp_path: Path) -> None:
    net, path = nets[number], str(tmp_path / "cache")
    cache = Cache(net, 3)
    first = sample(net, PROMPTS, 3, cache)
    cache.save(path, {"hidden_size": 32})
    loaded = Cache.restore(read_cache(path, {"hidden_size": 32}), net)
    rest = sample(net, [[], [], []], 5, loaded)
    assert [a + b for a, b in zip(first, rest, strict=True)] == sample(net, PROMPTS, 8)
    # The loaded cache continues with more prompt tokens.
    again = Cache.restore(read_cache(path, {"hidden_size": 32}), net)
    more = sample(net, [[1, 2], [3], []], 5, again)
    assert more == sample(net, [a + b + c for a, b, c in zip(PROMPTS, first, [[1, 2], [3], []], strict=True)], 5)


def test_wrong_caches(nets: list[LanguageModel], tmp_path: Path) -> None:
    path = tmp_path / "cache"
    Cache(nets[0], 1).save(str(path), {"hidden_size": 32})
    with pytest.raises(UserError, match="other settings"):
        read_cache(str(path), {"hidden_size": 64})
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be read"):
        read_cache(str(path), {"hidden_size": 32})
    with pytest.raises(UserError, match="not found"):
        read_cache(str(tmp_path / "nothing"), {})
    with pytest.raises(UserError, match="--save-cache: .* cannot be written"):
        Cache(nets[0], 1).save(str(tmp_path / "no" / "folder"), {})


def test_a_cache_is_written_into_what_is_no_file(nets: list[LanguageModel], tmp_path: Path) -> None:
    (tmp_path / "null").symlink_to("/dev/null")
    Cache(nets[0], 1).save(str(tmp_path / "null"), {})
    assert (tmp_path / "null").is_symlink() and (tmp_path / "null").is_char_device()
    assert [path.name for path in tmp_path.iterdir()] == ["null"]
