"""Token files, the order of samples, and batches."""

from megatron_sse.data.batch import Batch
from megatron_sse.data.checks import check_data
from megatron_sse.data.corpus import prepare_corpus
from megatron_sse.data.iterators import build_data_iterators

__all__ = ["Batch", "build_data_iterators", "check_data", "prepare_corpus"]
