"""Names in the folder of a run (monitor.folder)."""

# The settings with all defaults filled in; each checkpoint has a file of this name, too.
CONFIG = "config.yaml"
CHECKPOINTS, LOGS, TENSORBOARD = "checkpoints", "logs", "tensorboard"
# A line of JSON for each reported step.
METRICS = "metrics.jsonl"
# In reinforcement learning: a file for each reported step, with a line of JSON for each answer to its first prompt.
SAMPLES = "samples"
# The lease of the run that writes to the folder (lease.py).
LEASE = "training"
# The beginning of an event file's name, by which TensorBoard recognises it.
EVENTS = "events.out.tfevents"


def launcher_lease(node: int) -> str:
    """Return the name of the lease of a machine's launcher, by the machine's number in the run."""
    return f"node_{node}"
