"""Checked configuration of a run."""
