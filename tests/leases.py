"""Files of leases whose holders are not what they seem."""

import json
from dataclasses import asdict, replace
from pathlib import Path

from megatron_sse.lease import Holder


def leave(name: Path, number: int, holder: Holder) -> Path:
    """Leave the file of a lease."""
    file = name.with_name(f"{name.name}.lease_{number}")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(asdict(holder)))
    return file


def elsewhere(name: Path) -> Path:
    """Leave the lease of a process on another machine."""
    return leave(name, 4, replace(Holder.of_this_process(), host="node7", boot="another", pid=12))


def alive_here(name: Path) -> Path:
    """Leave the lease of a process of this machine that is alive."""
    return leave(name, 1, Holder.of_this_process())
