"""YAML configurations that ship with the package; reference.yaml documents every key."""
