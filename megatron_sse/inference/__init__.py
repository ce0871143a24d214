"""Text from a trained model, token by token, from states of constant size."""
