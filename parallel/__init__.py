"""Everything that crosses ranks: device, process groups, who holds which tokens."""
