"""Names in the folder of a run (monitor.folder)."""

# The settings with all defaults filled in; each checkpoint has a file of this name, too.
CONFIG = "config.yaml"
CHECKPOINTS, LOGS, TENSORBOARD = "checkpoints", "logs", "tensorboard"
# A line of JSON for each reported step.
METRICS = "metrics.jsonl"
# The lease of the run that writes to the folder (lease.py).
LEASE = "training"
# The beginning of an event file's name, by which TensorBoard recognises it.
EVENTS = "events.out.tfevents"
