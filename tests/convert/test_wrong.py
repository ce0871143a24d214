"""Wrong folders, damaged files and full disks give one line each and no partly written folder."""

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sse import installed
from megatron_sse.cli import main
from megatron_sse.errors import UserError
from megatron_sse.pretrained.open import open_model
from tests.convert.support import convert, make_dense, random_tokens
from tests.leases import alive_here


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dense(tmp_path_factory.mktemp("llama") / "source", "llama")


@pytest.fixture(scope="module")
def ours(llama: Path) -> Path:
    assert convert(str(llama), str(llama.parent / "ours")) == 0
    return llama.parent / "ours"


def shard(folder: Path, name: str) -> Path:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"][name]


NORM = "model.norm.weight"


def remove_shard(folder: Path) -> None:
    shard(folder, NORM).unlink()


def truncate_shard(folder: Path) -> None:
    path = shard(folder, NORM)
    path.write_bytes(path.read_bytes()[:-10])


def swap_shards(folder: Path) -> None:
    first, second = shard(folder, NORM), shard(folder, "model.embed_tokens.weight")
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def take_shard_of_another_model(folder: Path) -> None:
    path = shard(folder, NORM)
    tensors = load_file(path)
    tensors[NORM] = torch.ones(16)
    save_file(tensors, path)


def remove_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def damage_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def forget_a_setting(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    del values["hidden_size"]
    (folder / "config.json").write_text(json.dumps(values))


def point_outside(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"][NORM] = "../../other.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def keep_a_pickle_only(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").touch()


def integers(folder: Path) -> None:
    path = shard(folder, NORM)
    tensors = load_file(path)
    tensors[NORM] = tensors[NORM].to(torch.int8)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_shard, r"model-.*safetensors: not found; model.safetensors.index.json names it$"),
        (truncate_shard, r"model-.*safetensors: cannot be read as safetensors \(.*\)$"),
        (swap_shards, r"model.safetensors.index.json: lists .* in model-.*, which does not hold it$"),
        (take_shard_of_another_model, r"settings: model.norm.weight \(16 found, 32 expected\)$"),
        (remove_config, r"^SRC: .* holds no checkpoint; give the path of a checkpoint, of a folder of .*$"),
        (damage_config, r"config.json: cannot be read as JSON .Invalid JSON: .*$"),
        (forget_a_setting, r"config.json: hidden_size: got None, allowed a number$"),
        (point_outside, r"model.safetensors.index.json: its weight_map does not name files of the folder$"),
        (keep_a_pickle_only, r"no model.safetensors and no .*; other formats of weights are not read$"),
        (integers, r"model.norm.weight has type I8, allowed F64, F32, F16, BF16$"),
    ],
)  # fmt: skip
def test_damaged_sources(llama: Path, tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    shutil.copytree(llama, tmp_path / "source")
    damage(tmp_path / "source")
    with pytest.raises(UserError, match=message):
        convert(str(tmp_path / "source"), str(tmp_path / "ours"))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_damaged_checkpoint_is_refused(ours: Path, tmp_path: Path) -> None:
    shutil.copytree(ours, tmp_path / "ours")
    path = tmp_path / "ours/__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="__0_0.distcp: its SHA-256 is not the manifest's"):
        convert(str(tmp_path / "ours"), str(tmp_path / "hf"))


def test_targets_that_exist_are_left_alone(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours/file").touch()
    with pytest.raises(UserError, match="^DST: got .*, which exists, allowed a new folder$"):
        convert(str(llama), str(tmp_path / "ours"))
    with pytest.raises(UserError, match="^DST: .* cannot be written: Not a directory$"):
        convert(str(llama), str(tmp_path / "ours/file/below"))
    assert [path.name for path in (tmp_path / "ours").iterdir()] == ["file"]


def test_a_conversion_deletes_only_what_a_killed_one_left(llama: Path, tmp_path: Path) -> None:
    for name in (
        "ours.partial",
        "ours.partial_0123456789abcdef",
        "ours.partial_of_mine",
        "other.partial_0123456789abcdef",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("mine")
    assert convert(str(llama), str(tmp_path / "ours")) == 0
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["other.partial_0123456789abcdef", "ours", "ours.partial", "ours.partial_of_mine"]
    assert (tmp_path / "ours.partial/file").read_text() == "mine"


def test_a_second_conversion_to_the_same_folder_is_refused(llama: Path, tmp_path: Path) -> None:
    lease = alive_here(tmp_path / "ours")
    (tmp_path / "ours.partial_0123456789abcdef").mkdir()
    with pytest.raises(
        UserError, match=rf"^DST: got {tmp_path}/ours, which process {os.getpid()} on .* is writing to; "
    ):
        convert(str(llama), str(tmp_path / "ours"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [lease.name, "ours.partial_0123456789abcdef"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(folder)], capture_output=True
    ).returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("to", ["ours", "hf"])
def test_a_full_disk(llama: Path, ours: Path, small_disk: Path, to: str) -> None:
    with pytest.raises(UserError, match="^DST: .*/disk/new cannot be written: .*No space left on device"):
        convert(str(llama if to == "ours" else ours), str(small_disk / "new"))
    assert list(small_disk.iterdir()) == []


def test_other_logits_are_exit_status_1(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["convert", str(llama)]
    assert main([*arguments, str(tmp_path / "a"), "--tolerance", "1e-12"]) == 1
    # This conversion swaps two projections.
    from megatron_sse.convert import command

    def swapped(links, source):
        for name, tensor in original(links, source):
            yield name, tensor.flip(0) if name.endswith("1.mlp.linear_fc1.weight") else tensor

    original = command.to_ours
    monkeypatch.setattr(command, "to_ours", swapped)
    assert main([*arguments, str(tmp_path / "b")]) == 1


def test_packages_that_are_missing_are_named(
    llama: Path, ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = {"transformers"}
    find = installed.importlib.util.find_spec
    monkeypatch.setattr(installed.importlib.util, "find_spec", lambda name: None if name in missing else find(name))
    with pytest.raises(UserError, match=r"source \(a llama model\): needs transformers, .* pip install .*\[hf\]"):
        convert(str(llama), str(tmp_path / "ours"))
    # Converting from our format to our format needs no transformers.
    assert convert(str(ours), str(tmp_path / "hf")) == 0
    missing.add("safetensors")
    with pytest.raises(UserError, match="needs safetensors, which is not installed"):
        convert(str(llama), str(tmp_path / "ours"))


def test_only_what_needs_transformers_imports_it(ours: Path, tmp_path: Path) -> None:
    code = "import sys; from megatron_sse.cli import main\n"
    code += f"assert main(['convert', {str(ours)!r}, {str(tmp_path / 'hf')!r}]) == 0\n"
    code += "assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


SCORE = ["score", "--checkpoint"]


@pytest.mark.parametrize("kind", ["llama", "ours"])
def test_score(llama: Path, ours: Path, tmp_path: Path, kind: str) -> None:
    tokens_BL = random_tokens(length=9)
    save_file({"input_ids": tokens_BL}, tmp_path / "x.safetensors")
    folder = {"llama": llama, "ours": ours}[kind]
    files = ["--input", str(tmp_path / "x.safetensors"), "--output", str(tmp_path / "y.safetensors")]
    assert main([*SCORE, str(folder), *files]) == 0
    logits = load_file(tmp_path / "y.safetensors")["logits"]
    assert logits.shape == (2, 9, 99) and logits.dtype == torch.float32
    from megatron_sse.pretrained.logits import compute_logits

    assert (logits - compute_logits(open_model("", llama), tokens_BL)).abs().max() < 1e-4
    assert stat.S_IMODE((tmp_path / "y.safetensors").stat().st_mode) == stat.S_IMODE(new_file(tmp_path).stat().st_mode)
    # A link to /dev/null stands for it: without the fix, a test would replace the machine's own.
    (tmp_path / "null").symlink_to("/dev/null")
    assert main([*SCORE, str(folder), *files[:3], str(tmp_path / "null")]) == 0
    assert stat.S_ISCHR((tmp_path / "null").stat().st_mode)


def new_file(folder: Path) -> Path:
    """Return a file with the mode that the umask leaves."""
    (folder / "new").touch()
    return folder / "new"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (None, "x.safetensors: not found"),
        ({"tokens": torch.ones(1, 2)}, "x.safetensors has tokens, needed input_ids"),
        ({"input_ids": torch.ones(3, dtype=torch.int64)}, r"input_ids is torch.int64 [3], allowed integers [B, L]"),
        ({"input_ids": torch.ones(1, 3)}, r"input_ids is torch.float32 [1, 3], allowed integers [B, L]"),
        ({"input_ids": torch.tensor([[0, 99]])}, "input_ids holds 99, allowed 0 to 98"),
        ({"input_ids": torch.tensor([[0, -1]])}, "input_ids holds -1, allowed 0 to 98"),
    ],
)
def test_wrong_tokens(
    ours: Path,
    tmp_path: Path,
    tensors: dict[str, torch.Tensor] | None,
    message: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if tensors is not None:
        save_file(tensors, tmp_path / "x.safetensors")
    files = ["--input", str(tmp_path / "x.safetensors"), "--output", str(tmp_path / "y.safetensors")]
    assert main([*SCORE, str(ours), *files]) == 2
    errors = capfd.readouterr().err
    assert errors.startswith("--input: ") and errors.endswith(message + "\n") and errors.count("\n") == 1
