"""Token files, the order of samples, and batches.

This file imports none of its modules, so that the workers which build token files load neither torch nor Megatron-Core.
"""
