"""Settings of any kind, in YAML and on the command line."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megatron_sse.config import count_processes, load_config, plan_stages
from megatron_sse.config.load import schema_keys
from megatron_sse.data.sources import check_data
from tests.fuzz.support import TEXTS, VALUES, answers, broken_bytes, changed, refused_in_a_line
from tests.training.support import small_run

STAGES = [{"tokens": 64, "sequence_length": 16}, {"tokens": 128, "sequence_length": 32, "learning_rate": 1e-3}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a run's settings and token file."""
    made = tmp_path_factory.mktemp("settings")
    (made / "run.yaml").write_text(small_run(made).to_yaml())
    return made


def values_of(folder: Path) -> dict:
    return yaml.safe_load((folder / "run.yaml").read_text())


def prepare(path: Path, *overrides: str) -> None:
    """Do what a launcher does before it starts processes."""
    config = load_config(path, list(overrides))
    count_processes(config, 1, 0)
    plan_stages(config)
    check_data(config)


@given(st.data())
def test_a_value_of_any_kind_at_any_place(folder: Path, data: st.DataObject) -> None:
    values = values_of(folder)
    if data.draw(st.booleans()):
        del values["training"]["steps"]
        values["data"].pop("sequence_length", None)
        values["stages"] = STAGES
    path = folder / "wrong.yaml"
    try:
        path.write_text(yaml.safe_dump(data.draw(changed(values)), allow_unicode=True))
    # Halves of characters, and numbers of more digits than Python writes.
    except ValueError:
        return
    refused_in_a_line(prepare, path)
    answers("plan", path)


@given(st.data())
def test_a_file_of_any_bytes(folder: Path, data: st.DataObject) -> None:
    path = folder / "broken.yaml"
    path.write_bytes(data.draw(broken_bytes((folder / "run.yaml").read_bytes())))
    refused_in_a_line(prepare, path)


@given(key=st.sampled_from(schema_keys()), value=VALUES | TEXTS)
def test_an_override_of_any_kind(folder: Path, key: str, value: object) -> None:
    text = (
        value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True) if _writable(value) else ""
    )
    refused_in_a_line(prepare, folder / "run.yaml", f"{key}={text}")


def _writable(value: object) -> bool:
    try:
        yaml.safe_dump(value)
    except ValueError:
        return False
    return True
