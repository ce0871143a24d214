"""One tiny exported model, of bytes and with each kind of convolution, for all tests of this folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Sets up transformers before its import.
from tests.convert import conftest  # noqa: F401
from tests.convert.support import SOFTMAX, convert, make_ours, model


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that `convert` wrote."""
    folder = tmp_path_factory.mktemp("export")
    sse = {"recurrence": "gdn", "num_value_heads": 4, "short_convolution": 3}
    section = model("sse, softmax", sse, softmax=SOFTMAX, input_convolution=4, vocab_size=257)
    ours = make_ours(folder / "ours", section)
    (ours / "tokens.json").write_text(json.dumps({"tokenizer": "bytes"}))
    assert convert(str(ours), str(folder / "tiny")) == 0
    return folder / "tiny"


@pytest.fixture(scope="session")
def load(export: Path) -> Callable[..., Any]:
    """Return a function that loads the exported model, or the one in another folder."""
    import transformers

    def load(folder: Path = export, **options: Any) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)

    return load


@pytest.fixture(scope="session")
def network(load: Callable[..., Any]) -> Any:
    """Return the exported model, for tests that leave it as it is."""
    return load()
