"""A summary of a token file, in lines for the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_sse.data.builder.encode import token_type
from megatron_sse.data.builder.parts import Counts
from megatron_sse.data.histogram import format_lengths
from megatron_sse.data.metadata import Metadata
from megatron_sse.visible import count_of


def describe_metadata(metadata: Metadata) -> Iterator[str]:
    """Yield lines about the tokens of a file."""
    dtype = token_type(metadata.vocab_size)
    documents, tokens = count_of(metadata.documents, "document"), count_of(metadata.tokens, "token")
    yield f"{documents}, {tokens}, {metadata.bytes:,} bytes of text"
    yield f"tokenizer {metadata.tokenizer}: {metadata.vocab_size:,} tokens, {dtype}; model.vocab_size needs as many"
    per_byte = metadata.tokens / metadata.bytes
    yield f"{per_byte:.4f} tokens per byte, {metadata.unigram_bits_per_byte:.4f} bits per byte by frequency alone"
    if metadata.loss_mask and metadata.label_tokens is not None:
        yield f"{metadata.label_tokens:,} tokens count as labels ({metadata.label_tokens / metadata.tokens:.1%})"


def describe_build(output: str, counts: Counts, metadata: Metadata) -> Iterator[str]:
    """Yield the lines that a build prints at its end."""
    yield f"{output}.bin, .idx, .json{', .mask' if metadata.loss_mask else ''}"
    yield from describe_metadata(metadata)
    left_out = [f"{count:,} x {kind}" for kind, count in sorted(counts.left_out.items())]
    yield f"skipped: {', '.join(left_out) or 'nothing'}"
    yield ""
    yield from format_lengths(counts.lengths, counts.length_tokens)
