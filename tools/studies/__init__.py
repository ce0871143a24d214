"""What the studies share: training many runs with one command that resumes, their results, their sizes."""
