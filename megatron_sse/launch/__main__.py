"""`python -m megatron_sse.launch`."""

import sys

from megatron_sse.interrupts import run_program


def _run() -> int:
    # Imported late: an interrupt ends the program without a traceback from here on.
    from megatron_sse.launch import start

    return start.main(sys.argv[1:])


if __name__ == "__main__":
    run_program(_run)
