"""Set-up of transformers before its import: no network, and modeling files copied to a temporary folder."""

import atexit
import os
import shutil
import tempfile

_folder = tempfile.mkdtemp(prefix="hf-home-")
atexit.register(shutil.rmtree, _folder, ignore_errors=True)
os.environ |= {"HF_HOME": _folder, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
