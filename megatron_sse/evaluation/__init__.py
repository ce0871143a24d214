"""Measures of what a model predicts and recalls: perplexity by position, associative recall, needles."""
