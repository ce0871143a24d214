"""What SSE layers do with a text: use of partitions, rank of states, how long states remember."""
