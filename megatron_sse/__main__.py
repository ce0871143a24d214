"""`python -m megatron_sse`, and the command `megatron-sse`."""

from megatron_sse.interrupts import run_program


def main() -> None:
    """Run the command line, and end the process with its exit status."""

    def run() -> int:
        # Imported late: an interrupt ends the program without a traceback from here on.
        from megatron_sse import cli

        return cli.main()

    run_program(run)


if __name__ == "__main__":
    main()
