"""Names of checkpoints and of what is in them; that of the settings is CONFIG of run_folder.py."""

from megatron_sse.data.metadata import CHAT_TEMPLATE, TOKENIZER, TOKENIZER_SETTINGS

# A checkpoint is the folder iter_0000100; the file `latest` beside it names the one to resume from.
ITERATION, LATEST = "iter_", "latest"
# Before the name of a checkpoint while it is written, deleted, and replaced by a new one of the same step.
PARTIAL, REMOVED, REPLACED = "partial_", "removed_", "replaced_"
# Ours: sizes and hashes of all files, and the data that the model was trained on.
MANIFEST, DATA = "manifest.json", "data.json"
# In a checkpoint that led only to steps that were skipped, since its loss or gradients are not finite.
UNUSABLE = "unusable.txt"
# Those of torch's and Megatron-Core's distributed checkpoints.
INDEX, COMMON, STORAGE_FORMAT = ".metadata", "common.pt", "metadata.json"
# Names of the optimizer's tensors start with this.
OPTIMIZER = "optimizer."
# What the token ids mean: the description of the first training file, and its tokenizer.
TOKENS = "tokens.json"
# Suffixes of the files beside a token file, and their names in a checkpoint.
TOKENIZER_FILES = {
    ".json": TOKENS,
    f".{TOKENIZER}": TOKENIZER,
    f".{TOKENIZER_SETTINGS}": TOKENIZER_SETTINGS,
    f".{CHAT_TEMPLATE}": CHAT_TEMPLATE,
}


def step_name(step: int) -> str:
    """Return the name of the checkpoint after `step` steps."""
    return f"{ITERATION}{step:07d}"
