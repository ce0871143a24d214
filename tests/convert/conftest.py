"""transformers, before it is imported: no network, and copies of modeling files in a folder that goes away."""

import atexit
import os
import shutil
import tempfile

_folder = tempfile.mkdtemp(prefix="hf-home-")
atexit.register(shutil.rmtree, _folder, ignore_errors=True)
os.environ |= {"HF_HOME": _folder, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
