"""Reinforcement learning on problems whose answers can be checked: generate, score, train."""
