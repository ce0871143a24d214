"""Gloo with one thread per process for all groups.

torch.distributed gives each group a device of its own, whose thread wakes up hundreds of times a second. A layout has
some fifteen groups per process, so that many processes on a few cores would spend their time in idle threads.
"""

from __future__ import annotations

import functools
import os
from datetime import timedelta

from torch.distributed import Store, distributed_c10d
from torch.distributed.distributed_c10d import ProcessGroupGloo


class OneThreadGloo(ProcessGroupGloo):
    """Gloo's process group on the devices that all groups of this process share."""

    def __init__(self, store: Store, rank: int, size: int, timeout: timedelta) -> None:
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = timeout
        options._devices = shared_devices()
        super().__init__(store, rank, size, options)


@functools.cache
def shared_devices() -> list[ProcessGroupGloo.Device]:
    """Return this process's gloo devices, one for each interface in GLOO_SOCKET_IFNAME, as torch.distributed does."""
    names = os.environ.get("GLOO_SOCKET_IFNAME")
    if not names:
        return [ProcessGroupGloo.create_default_device()]
    return [ProcessGroupGloo.create_device(interface=name) for name in names.split(",")]


def share_gloo_devices() -> None:
    """Make torch.distributed use OneThreadGloo for every gloo group that it creates from now on."""
    distributed_c10d.ProcessGroupGloo = OneThreadGloo  # type: ignore[misc]
