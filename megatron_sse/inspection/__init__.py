"""Measures of SSE layers on given texts: use of partitions, rank of states, half-life of states."""
