"""`plan` answers without torch, whose import takes seconds."""

import subprocess
import sys

PROGRAM = """
import sys
import megatron_sse.planning.command
loaded = {"torch", "megatron.core"} & sys.modules.keys()
assert not loaded, loaded
"""


def test_plan_does_without_torch() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
