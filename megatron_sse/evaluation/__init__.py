"""How well a model recalls and predicts: perplexity by position, associative recall, needles."""
