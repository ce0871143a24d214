"""Monitoring a run: console lines, TensorBoard, profiles, warnings, and the FLOPs behind speed and utilisation."""
