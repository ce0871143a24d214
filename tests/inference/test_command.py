"""`megatron-sse generate`: its output, and the errors of wrong requests."""

import io
from pathlib import Path

import pytest
import torch

from megatron_sse.cli import main
from megatron_sse.pretrained.logits import compute_logits
from megatron_sse.pretrained.open import open_model
from megatron_sse.pretrained.text import ByteTokenizer
from megatron_sse.visible import make_visible
from tests.convert.support import convert

PROMPT = "def f(x):"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run the command and return what it prints on stdout."""
    assert main(["generate", *arguments]) == 0
    return capsys.readouterr().out


def greedy(folder: Path, tokens: list[int], num_tokens: int) -> list[int]:
    """Return greedy tokens by parallel forward passes of ever longer sequences."""
    opened = open_model("", folder)
    for _ in range(num_tokens):
        tokens = [*tokens, int(compute_logits(opened, torch.tensor([tokens]))[0, -1].argmax())]
    return tokens[-num_tokens:]


def test_tokens(capsys: pytest.CaptureFixture[str], hybrid: Path, tmp_path: Path) -> None:
    file = tmp_path / "tokens.txt"
    file.write_text("1 2 3\n40\n")
    out = run(capsys, str(hybrid), "--tokens", str(file), "--max-tokens", "4")
    lines = [[int(word) for word in line.split()] for line in out.splitlines()]
    assert lines == [greedy(hybrid, [1, 2, 3], 4), greedy(hybrid, [40], 4)]


def test_text_of_checkpoint_and_export(capsys: pytest.CaptureFixture[str], pure: Path, tmp_path: Path) -> None:
    options = ["--max-tokens", "6"]
    text = run(capsys, str(pure), "--prompt", PROMPT, *options)
    expected = bytes(token for token in greedy(pure, list(PROMPT.encode()), 6) if token < 256)
    # Incomplete UTF-8 at the end is never printed as a replacement character.
    assert make_visible(expected.decode(errors="replace")).startswith(text.removesuffix("\n")) and text
    (tmp_path / "prompt.txt").write_text(PROMPT)
    assert run(capsys, str(pure), "--prompt-file", str(tmp_path / "prompt.txt"), *options) == text
    both = run(capsys, str(pure), "--prompt", PROMPT, "--prompt", "a", *options)
    assert both.startswith(f"--- 1\n{text}--- 2\n")
    assert convert(str(pure), str(tmp_path / "export")) == 0
    capsys.readouterr()
    assert run(capsys, str(tmp_path / "export"), "--prompt", PROMPT, *options) == text


def test_a_model_cannot_steer_the_terminal(
    capsys: pytest.CaptureFixture[str], pure: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ByteTokenizer, "stream", lambda self: lambda token: "\x1b]0;title\x07\u202e\n")
    assert run(capsys, str(pure), "--prompt", PROMPT, "--max-tokens", "1") == "\\x1b]0;title\\x07\\u202e\n\n"


def test_a_cache_between_calls(capsys: pytest.CaptureFixture[str], pure: Path, tmp_path: Path) -> None:
    prompt, cache = tmp_path / "tokens.txt", str(tmp_path / "cache")
    prompt.write_text("7 8 9\n")
    whole = run(capsys, str(pure), "--tokens", str(prompt), "--max-tokens", "7").split()
    first = run(capsys, str(pure), "--tokens", str(prompt), "--max-tokens", "3", "--save-cache", cache).split()
    prompt.write_text("\n")
    rest = run(capsys, str(pure), "--tokens", str(prompt), "--max-tokens", "4", "--load-cache", cache).split()
    assert first + rest == whole


def test_interactive(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, hybrid: Path, tmp_path: Path
) -> None:
    cache = str(tmp_path / "cache")
    options = [str(hybrid), "--max-tokens", "3"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\nab\n\ncd\n" + "x" * 60 + "\n"))
    assert main(["generate", *options]) == 0
    said = capsys.readouterr()
    # The empty first line has no text to continue; the last line is too long for the softmax layer.
    assert said.err.count("empty prompt") == 1 and said.err.count("allowed 64") == 1
    steps = run(capsys, *options, "--prompt", "ab", "--save-cache", cache)
    steps += run(capsys, *options, "--prompt", "", "--load-cache", cache, "--save-cache", cache)
    steps += run(capsys, *options, "--prompt", "cd", "--load-cache", cache)
    assert said.out == steps


def test_a_text_that_has_ended_is_not_continued(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, pure: Path
) -> None:
    prompt = list(b"(")
    tokens = greedy(pure, prompt, 4)
    assert tokens[3] not in tokens[:3] and greedy(pure, [*prompt, *tokens, *prompt], 3) != tokens[:3]
    monkeypatch.setattr(ByteTokenizer, "end", tokens[3])
    monkeypatch.setattr("sys.stdin", io.StringIO("(\n(\n"))
    assert run(capsys, str(pure), "--max-tokens", "5") == f"{bytes(tokens[:3]).decode()}\n" * 2


def test_a_chat(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, pure: Path) -> None:
    """Each prompt is rendered by the template; interactive, each line with all that was said before."""
    one = "<|user|>\n{}\n<|assistant|>\n"
    answer = run(capsys, str(pure), "--chat", "--prompt", "2 + 2?", "--max-tokens", "3")
    assert answer == run(capsys, str(pure), "--prompt", one.format("2 + 2?"), "--max-tokens", "3")
    answers = iter(["4", "6\n"])
    monkeypatch.setattr(ByteTokenizer, "stream", lambda self: lambda token: next(answers))
    asked: list[str] = []
    encode = ByteTokenizer.encode

    def note(self: ByteTokenizer, text: str, continues: bool = False) -> list[int]:
        asked.append(text)
        return encode(self, text, continues)

    monkeypatch.setattr(ByteTokenizer, "encode", note)
    lines = io.StringIO("2 + 2?\n3 + 3?\n")
    monkeypatch.setattr(lines, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdin", lines)
    assert main(["generate", str(pure), "--chat", "--max-tokens", "1"]) == 0
    said = capsys.readouterr()
    first = one.format("2 + 2?")
    assert asked == ["\n", first, first + "4\n" + one.format("3 + 3?")] and said.out == "4\n6\n\n"
    assert "Each line is a prompt. Ctrl-D ends.\n> > > " in said.err


WRONG = {
    "chat of tokens": (["{model}", "--chat", "--tokens", "x"], "--tokens: given with --chat"),
    "graphs without a GPU": (["{model}", "--prompt", "a", "--cuda-graph"], "--cuda-graph: got a machine without a GPU"),
    "graphs of two": (["{model}", "--prompt", "a", "--cuda-graph", "--tensor", "2"], "--cuda-graph: got 2 processes"),
    "no folder": (["{tmp}/none"], "CHECKPOINT: folder"),
    "empty prompt": (["{model}", "--prompt", ""], "--prompt 1: got an empty prompt"),
    "empty file": (["{model}", "--tokens", "/dev/null"], "which is empty"),
    "empty line": (["{model}", "--tokens", "{tmp}/empty_line"], "empty_line:2: got an empty prompt"),
    "words": (["{model}", "--tokens", "{tmp}/words"], "cannot be read as lines of token ids"),
    "large token": (["{model}", "--tokens", "{tmp}/large"], "got token 257, allowed 0 to 256"),
    "no file": (["{model}", "--prompt-file", "{tmp}/none"], "No such file"),
    "both": (["{model}", "--prompt", "a", "--tokens", "x"], "--tokens: got text as well"),
    "temperature": (["{model}", "--prompt", "a", "--temperature", "-1"], "--temperature: got -1.0"),
    "top p": (["{model}", "--prompt", "a", "--top-p", "0"], "--top-p: got 0.0"),
    "max tokens": (["{model}", "--prompt", "a", "--max-tokens", "0"], "--max-tokens: got 0"),
    "context": (["{model}", "--prompt", "a", "--context", "0"], "--context: got 0, allowed 1 to 65536"),
    "tensor": (["{model}", "--prompt", "a", "--tensor", "-1"], "--tensor: got -1, allowed 1 to 65536"),
    "processes": (
        ["{model}", "--prompt", "a", "--tensor", "300", "--context", "2"],
        "got 600 processes, allowed 256, on",
    ),
    "chunk": (["{model}", "--prompt", "a", "--chunk", "0"], "--chunk: got 0"),
    "too long": (["{model}", "--prompt", "a", "--max-tokens", "64"], "allowed 64, the length (data.sequence_length)"),
    "no cache": (["{model}", "--prompt", "a", "--load-cache", "{tmp}/none"], "--load-cache: .* not found"),
    "no cache file": (["{model}", "--prompt", "a", "--load-cache", "{tmp}/words"], "--load-cache: .* cannot be read"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_requests(name: str, capsys: pytest.CaptureFixture[str], hybrid: Path, tmp_path: Path) -> None:
    for file, text in {"empty_line": "1\n\n2\n", "words": "one two\n", "large": "3 257\n"}.items():
        (tmp_path / file).write_text(text)
    arguments, message = WRONG[name]
    assert main(["generate", *(word.format(tmp=tmp_path, model=hybrid) for word in arguments)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "".join(message.split(" .* ")[0]) in said[0] and message.split(" .* ")[-1] in said[0]


def test_any_length(capsys: pytest.CaptureFixture[str], hybrid: Path) -> None:
    run(capsys, str(hybrid), "--prompt", "a", "--max-tokens", "64", "--any-length")


def test_no_cache_for_several_processes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, hybrid: Path
) -> None:
    assert main(["generate", str(hybrid), "--context", "2"]) == 2
    assert "got 2 processes, allowed 1" in capsys.readouterr().err


STARTED = [
    (["--context", "3"], "--tensor 1 x --context 3: got 4 processes, allowed a multiple of 3"),
    (["--context", "2", "--tensor", "1"], "--tensor 1 x --context 2: got 4 processes, allowed 2"),
]


@pytest.mark.parametrize(("options", "message"), STARTED)
def test_other_processes_than_a_launcher_started(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main(["generate", "no_model", "--prompt", "a", *options]) == 2
    assert capsys.readouterr().err == f"{message}\n"
