"""The same arithmetic as the torch forms, in Triton, for GPUs."""
