"""What a model costs: operations per token, and what GPUs can do."""
