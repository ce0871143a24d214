"""Benchmark of `data build`: speed and memory on the standard library's sources, repeated up to a given size.

Each tokenizer is measured in a process of its own, started as a user would start it; memory includes its workers.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import psutil

from megatron_sse.data.corpus import read_documents

MIB = 1 << 20
SAMPLE_SECONDS = 0.1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=1024, help="MiB of text for the byte tokenizer")
    parser.add_argument("--bpe-mib", type=int, default=256, help="MiB of text for the trained tokenizer")
    parser.add_argument("--vocabulary", type=int, default=32768, help="vocabulary size of the trained tokenizer")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--folder", type=Path, help="folder on the disk to measure; default the system's temporary folder"
    )
    return parser.parse_args()


def write_texts(path: Path, texts: list[str], size: int) -> int:
    """Write a JSONL file with at least `size` bytes of text, and return the number of bytes."""
    written = 0
    with path.open("w", encoding="utf-8") as file:
        while written < size:
            for text in texts:
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                written += len(text.encode())
                if written >= size:
                    break
    return written


def train_tokenizer(folder: Path, texts: list[str], vocabulary: int) -> Path:
    """Train a byte-level BPE tokenizer on the texts and return its folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    return folder


def measure(text: Path, output: Path, tokenizer: str, workers: int) -> tuple[float, float, float, str]:
    """Return wall-clock seconds, processor seconds, peak MiB of all processes together, and the printed output."""
    command = [sys.executable, "-m", "megatron_sse", "data", "build", str(text), "--output", str(output)]
    command += ["--tokenizer", tokenizer, "--workers", str(workers)]
    started, before, peak = time.perf_counter(), processor_seconds(), 0
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        while process.poll() is None:
            peak = max(peak, memory(process.pid))
            time.sleep(SAMPLE_SECONDS)
        seconds = time.perf_counter() - started
        if process.returncode:
            errors.seek(0)
            raise RuntimeError(errors.read().decode())
    assert process.stdout is not None
    return seconds, processor_seconds() - before, peak / MIB, process.stdout.read()


def processor_seconds() -> float:
    """Return the processor time of all descendants of this process that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def memory(pid: int) -> int:
    """Return the proportional set size of a process and its descendants in bytes: shared pages count once in all."""
    total = 0
    try:
        process = psutil.Process(pid)
        for each in [process, *process.children(recursive=True)]:
            total += each.memory_full_info().pss
    except psutil.Error:
        pass  # a process has ended meanwhile
    return total


def processor() -> str:
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return f"{found.group(1) if found else platform.processor()}, {os.cpu_count()} cores"


def main() -> None:
    args = parse_arguments()
    sources = read_documents(Path(sysconfig.get_paths()["stdlib"]))
    texts = [document.decode("utf-8", errors="replace") for document in sources.values()]
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    versions = ", ".join(f"{name} {version(name)}" for name in ("tokenizers", "numpy"))
    print(f"Commit {commit}, python {platform.python_version()}, {versions}; {processor()}; {args.workers} workers")
    print(f"Load before the start: {os.getloadavg()[0]:.1f}\n")
    print(
        "| tokenizer | text, MiB | tokens, millions | s | MB/s | processor s | MB per processor s | peak memory, MiB |"
    )
    print("|---|---|---|---|---|---|---|---|")
    try:
        trained = train_tokenizer(folder / "bpe", texts, args.vocabulary)
        for name, tokenizer, size in (
            ("bytes", "bytes", args.mib),
            (f"BPE, {args.vocabulary:,} tokens", str(trained), args.bpe_mib),
        ):
            text = folder / "text.jsonl"
            num_bytes = write_texts(text, texts, size * MIB)
            seconds, busy, peak, printed = measure(text, folder / "out", tokenizer, args.workers)
            found = re.search(r"([\d,]+) tokens", printed)
            assert found is not None
            tokens = int(found.group(1).replace(",", ""))
            speeds = " | ".join(f"{each:.1f} | {num_bytes / each / 1e6:.1f}" for each in (seconds, busy))
            print(f"| {name} | {num_bytes / MIB:,.0f} | {tokens / 1e6:,.1f} | {speeds} | {peak:,.0f} |", flush=True)
            for path in [text, *folder.glob("out*")]:
                path.unlink()
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
