"""The command `megatron-sse plot`."""

from __future__ import annotations

from megatron_sse.errors import UserError
from megatron_sse.installed import require
from megatron_sse.plot.read import read_runs
from megatron_sse.plot.request import Request
from megatron_sse.reports.results import result_folder


def run(request: Request) -> int:
    """Draw the runs: a PNG file for each picture, and index.html with all of them.

    Return the exit status. Raises UserError.
    """
    require("matplotlib", "megatron-sse plot", extra="plot")
    runs = read_runs(request.runs)
    # matplotlib is an extra.
    from megatron_sse.plot.figures import draw_all
    from megatron_sse.plot.page import write_page

    with result_folder(request.output) as target:
        pictures = draw_all(runs, target)
        try:
            page = write_page(runs, pictures, target)
        except OSError as error:
            raise UserError(f"--output: {target}: cannot be written ({error.strerror})") from None
    for picture in pictures:
        print(picture.path)
    print(f"{page} shows all of them: open it in a browser")
    return 0
