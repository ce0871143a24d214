"""The configurations that come with the package: listed, and written as the beginning of one's own."""
