"""Starting a run's processes on this machine, and restarting them together with those of other machines."""
