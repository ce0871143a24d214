"""Shared code of the studies: training many runs with one command that resumes, their results, their sizes."""
