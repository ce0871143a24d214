"""Token files, the order of samples, and batches.

Modules are imported by their own names: workers that build token files load neither torch nor Megatron-Core.
"""
