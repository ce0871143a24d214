"""`megatron-sse evaluate`: its numbers against a direct forward pass, its output, and the errors of wrong requests."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from megatron_sse.cli import main
from megatron_sse.config import MQARTask, NeedleTask
from megatron_sse.data.metadata import Metadata
from megatron_sse.data.tasks.mqar import make_recall
from megatron_sse.evaluation import command, needles
from megatron_sse.evaluation.needles import make_samples
from megatron_sse.evaluation.perplexity import Bucket
from megatron_sse.evaluation.pictures import is_filled
from megatron_sse.evaluation.recall import sample_generator
from megatron_sse.pretrained.logits import compute_logits
from megatron_sse.pretrained.open import open_model
from megatron_sse.pretrained.text import ByteTokenizer
from megatron_sse.visible import make_visible
from tests.data.files import write_tokens
from tests.inference.support import make_checkpoint, model
from tests.leases import alive_here

PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Write two documents of bytes, of 50 and 21 tokens, with a loss mask."""
    prefix = str(tmp_path_factory.mktemp("tokens") / "file")
    tokens_T = np.random.default_rng(2).integers(0, 256, 71)
    tokens_T[[49, 70]] = 256
    write_tokens(prefix, [tokens_T[:50].tolist(), tokens_T[50:].tolist()])
    mask_T = np.ones(71, dtype=np.uint8)
    mask_T[10:20] = 0
    Path(f"{prefix}.mask").write_bytes(mask_T.tobytes())
    counts = {"label_tokens": 61, "label_bytes": 122}
    Metadata("bytes", 257, 2, 71, 142, 8.0, loss_mask=True, **counts).write(Path(f"{prefix}.json"))
    return prefix


def evaluate(folder: Path, output: Path, *arguments: str) -> dict[str, Any]:
    """Run the command and return the content of its results.json."""
    assert main(["evaluate", str(folder), *arguments, "--output", str(output)]) == 0
    return json.loads((output / "results.json").read_text())


def expected_losses(folder: Path, prefix: str, length: int) -> dict[int, list[float]]:
    """Return the losses of all tokens that count, by bucket of position, from a forward pass of each piece."""
    opened, found = open_model("", folder), {}
    tokens_T = np.fromfile(f"{prefix}.bin", np.uint16).astype(np.int64)
    mask_T = np.fromfile(f"{prefix}.mask", np.uint8)
    for begin, end in ((0, 50), (50, 71)):
        for first in range(begin, end - 1, length):
            piece = torch.from_numpy(tokens_T[first : min(first + length + 1, end)])
            loss_E = cross_entropy(compute_logits(opened, piece[None, :-1])[0], piece[1:], reduction="none")
            for place, loss in enumerate(loss_E.tolist()):
                if mask_T[first + place + 1]:
                    found.setdefault(1 << (place + 1).bit_length() - 1, []).append(loss)
    return found


@pytest.mark.parametrize(
    ("first", "length", "shown"),
    [(512, 512, False), (512, 700, False), (512, 800, True), (256, 512, True), (1, 1, True)],
)
def test_a_last_row_that_is_hardly_filled_is_not_drawn(first: int, length: int, shown: bool) -> None:
    assert is_filled(Bucket(first, 10, 1.0, 0.1), length) == shown


@pytest.mark.parametrize("kind", ["pure", "hybrid"])
def test_perplexity_by_position(kind: str, request: pytest.FixtureRequest, prefix: str, tmp_path: Path) -> None:
    folder = request.getfixturevalue(kind)
    options = ["--data", prefix, "--lengths", "16,60", "--batch", "2", "--chunk", "13"]
    results = evaluate(folder, tmp_path, "perplexity", *options)["perplexity"]
    assert [losses["length"] for losses in results] == [16, 60]
    for losses in results:
        expected = expected_losses(folder, prefix, losses["length"])
        assert {bucket["first"]: bucket["tokens"] for bucket in losses["buckets"]} == {
            first: len(values) for first, values in expected.items()
        }
        for bucket in losses["buckets"]:
            values = expected[bucket["first"]]
            assert abs(bucket["loss"] - np.mean(values)) < 1e-5
            assert abs(bucket["error"] - np.std(values) / np.sqrt(len(values))) < 1e-4
        every = [loss for values in expected.values() for loss in values]
        assert losses["tokens"] == len(every) == 71 - 2 - 10
        assert abs(losses["loss"] - np.mean(every)) < 1e-5
        assert abs(losses["bits_per_byte"] - np.mean(every) / np.log(2) / 2) < 1e-5
    # In pieces of 16 tokens the same tokens have less context.
    assert results[0]["loss"] != results[1]["loss"]
    assert (tmp_path / "perplexity.png").read_bytes().startswith(PNG)


def test_a_file_is_read_up_to_a_number_of_tokens(pure: Path, prefix: str, tmp_path: Path) -> None:
    [losses] = evaluate(pure, tmp_path, "perplexity", "--data", prefix, "--tokens", "55")["perplexity"]
    assert losses["tokens"] == 49 - 10 + 4


def test_recall_like_a_direct_forward_pass(pure: Path, tmp_path: Path) -> None:
    options = ["--lengths", "30,48", "--pairs", "6,12", "--keys", "200", "--values", "56", "--samples", "5"]
    results = evaluate(pure, tmp_path, "mqar", *options, "--seed", "4", "--chunk", "37")
    # 12 pairs need 36 tokens and do not fit into 30.
    assert [(r["pairs"], r["length"]) for r in results["mqar"]] == [(6, 30), (6, 48), (12, 48)]
    task, right = MQARTask(pairs=12, keys=200, values=56), 0
    for number in range(5):
        recall = make_recall(sample_generator(4, 48, 12, number), task, 48)
        logits_Ev = compute_logits(open_model("", pure), torch.from_numpy(recall.tokens_E)[None])[0]
        right += int((logits_Ev.argmax(-1).numpy()[recall.place_p] == recall.answer_p).sum())
    assert results["mqar"][2]["accuracy"] == right / 60
    assert results["settings"]["mqar"][0] == {"pairs": 6, "keys": 200, "values": 56}
    assert (tmp_path / "mqar.png").read_bytes().startswith(PNG)


def test_needles_are_greedy_answers(
    pure: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []
    original = needles.answer

    def answer(*arguments: Any) -> list[str]:
        said.extend(texts := original(*arguments))
        return texts

    monkeypatch.setattr(needles, "answer", answer)
    options = ["--variants", "single,multi_key", "--lengths", "256", "--depths", "0,100", "--digits", "2"]
    results = evaluate(pure, tmp_path, "needle", *options, "--samples", "3", "--batch", "2")["needle"]
    assert [(found["variant"], found["depth"]) for found in results] == [
        ("single", 0.0),
        ("single", 1.0),
        ("multi_key", 0.0),
        ("multi_key", 1.0),
    ]
    assert all(found["score"] == 0 for found in results) and len(said) == 4 * 3
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "needle_single.png", "needle_multi_key.png"}
    table = capsys.readouterr().out
    assert "needle, multi_key" in table and "100 %" in table
    # `generate` gives the same answer to the first text.
    prompt = make_samples(ByteTokenizer(), NeedleTask(digits=2), 256, 0.0, 1, 0)[0]
    (tmp_path / "prompt").write_text(prompt.prompt)
    tokens = ["--max-tokens", str(len(prompt.answer))]
    assert main(["generate", str(pure), "--prompt-file", str(tmp_path / "prompt"), *tokens]) == 0
    assert capsys.readouterr().out.rstrip("\n") == make_visible(said[0])


def test_all_tasks_go_into_one_file(pure: Path, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "has_pictures", lambda: False)
    options = ["--data", prefix, "--pairs", "4", "--variants", "single", "--depths", "50", "--samples", "1"]
    results = evaluate(pure, tmp_path, "perplexity", "mqar", "needle", *options)
    assert {"perplexity", "mqar", "needle", "checkpoint", "settings", "model", "versions"} == set(results)
    assert results["settings"]["lengths"] == [256] and results["settings"]["precision"] == "fp32"
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


WRONG = {
    "TASK: got 'mqr', allowed perplexity, mqar, needle": ["{pure}", "mqr"],
    "CHECKPOINT: folder": ["{tmp}/none", "mqar"],
    "--lengths: got '12,x', allowed different whole numbers": ["{pure}", "mqar", "--lengths", "12,x"],
    "--lengths: got '', allowed": ["{pure}", "mqar", "--lengths", ""],
    "--depths: got '50,101', allowed": ["{pure}", "needle", "--depths", "50,101"],
    "--pairs: got '4,4', allowed different": ["{pure}", "mqar", "--pairs", "4,4"],
    "--variants: got 'twin', allowed single": ["{pure}", "needle", "--variants", "twin"],
    "--samples: got 0, allowed 1": ["{pure}", "mqar", "--samples", "0"],
    "--lengths: got 128, allowed 64, the length": ["{hybrid}", "mqar", "--lengths", "32,128"],
    "--pairs: got 40, allowed at most 32, a third": ["{pure}", "mqar", "--pairs", "40", "--lengths", "96"],
    "--pairs: got 65, allowed at most 64, the number of keys": ["{pure}", "mqar", "--pairs", "65"],
    "mqar: got a model of 257 tokens, allowed 265 or more": ["{pure}", "mqar", "--keys", "200", "--values", "64"],
    "--lengths: got 20, allowed": ["{pure}", "needle", "--lengths", "20"],
    "--data: got nothing, allowed a token file's prefix": ["{pure}", "perplexity"],
    "none.idx not found": ["{pure}", "perplexity", "--data", "{tmp}/none"],
    "no tokenizer (tokenizer.json), and 300 tokens are not": ["{words}", "needle"],
    "cannot be created": ["{pure}", "mqar", "--output", "/dev/null/x"],
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_requests(
    message: str, capsys: pytest.CaptureFixture[str], pure: Path, hybrid: Path, words: Path, tmp_path: Path
) -> None:
    places = {"pure": pure, "hybrid": hybrid, "words": words, "tmp": tmp_path}
    arguments = [word.format(**places) for word in WRONG[message]]
    output = [] if "--output" in arguments else ["--output", str(tmp_path / "out")]
    assert main(["evaluate", *arguments, *output]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and message in said[0], said
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model with 300 tokens and no tokenizer."""
    return make_checkpoint(tmp_path_factory.mktemp("words") / "model", model(vocab_size=300))


def test_any_length(hybrid: Path, tmp_path: Path) -> None:
    results = evaluate(hybrid, tmp_path, "mqar", "--lengths", "128", "--samples", "1", "--any-length")
    assert results["mqar"][0]["length"] == 128


def test_of_an_exported_model(pure: Path, prefix: str, tmp_path: Path) -> None:
    assert main(["convert", str(pure), str(tmp_path / "exported")]) == 0
    options = ["perplexity", "--data", prefix]
    ours = evaluate(pure, tmp_path / "ours", *options)["perplexity"]
    assert evaluate(tmp_path / "exported", tmp_path / "theirs", *options)["perplexity"] == ours


def test_two_at_once_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], pure: Path) -> None:
    lease = alive_here(tmp_path / "out/results")
    assert main(["evaluate", str(pure), "mqar", "--output", str(tmp_path / "out")]) == 2
    assert f"--output: got {tmp_path / 'out'}, which process {os.getpid()} on " in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == [lease]
