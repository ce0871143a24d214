"""Prints what the GPU did in a run's profiles: its busy share, and its kernels by time.

python -m megatron_sse.tools.profile_summary RUN_FOLDER [--rows 30]
"""

import argparse
import gzip
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_sse.run_folder import TENSORBOARD

ON_GPU = {"kernel", "gpu_memcpy", "gpu_memset"}
WIDTH = 80


def summarize(events: list[dict[str, Any]], rows: int) -> Iterator[str]:
    """Yield lines about a trace's events: first a summary, then one for each of the kernels that take longest."""
    on_gpu = sorted((event for event in events if event.get("cat") in ON_GPU), key=lambda event: event["ts"])
    if not on_gpu:
        yield "no GPU events"
        return
    begin = reached = on_gpu[0]["ts"]
    busy = 0.0
    durations: defaultdict[str, list[float]] = defaultdict(list)
    for event in on_gpu:
        end = event["ts"] + event["dur"]
        # Streams overlap: time is counted once.
        busy += max(0.0, end - max(reached, event["ts"]))
        reached = max(reached, end)
        durations[event["name"]].append(event["dur"])
    yield f"{len(on_gpu)} launches and copies in {1e-3 * (reached - begin):.1f} ms, busy {busy / (reached - begin):.0%}"
    for name, own in sorted(durations.items(), key=lambda item: -sum(item[1]))[:rows]:
        yield f"{1e-3 * sum(own):10.3f} ms {len(own):6d} x {name[:WIDTH]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=30)
    options = parser.parse_args()
    traces = sorted((options.folder / TENSORBOARD / "profile").glob("*.json*"))
    if not traces:
        print(f"{options.folder}: no profile found (monitor.profile_steps makes one)", file=sys.stderr)
        return 2
    for path in traces:
        read = gzip.open if path.suffix == ".gz" else open
        with read(path, "rt") as file:
            print(path, *summarize(json.load(file)["traceEvents"], options.rows), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
