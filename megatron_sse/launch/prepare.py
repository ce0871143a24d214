"""What one process of a machine does before the processes of a run start: build the corpus, check the files."""

from megatron_sse.checkpoint.folders import check_named
from megatron_sse.config import RunConfig
from megatron_sse.data.corpus import prepare_corpus
from megatron_sse.data.sources import check_data


def prepare_data(config: RunConfig) -> None:
    """Build the corpus that the run asks for, check its token files and the checkpoints that it names.

    Call it once per machine. Raises UserError.
    """
    check_named(config)
    prepare_corpus(config)
    check_data(config)
