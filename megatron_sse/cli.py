"""The command `megatron-sse`: one subcommand per job."""

import argparse
import ctypes
import logging
import os
import select
import signal
import sys
from pathlib import Path
from typing import Any

from megatron_sse import __version__
from megatron_sse.config import ignored_settings, load_config
from megatron_sse.config.derive import describe_run
from megatron_sse.errors import INTERRUPT_EXIT, USER_ERROR_EXIT, SharedUserError, UserError
from megatron_sse.logs import open_log, set_up_logging

logger = logging.getLogger(__name__)

# Of prctl.
PR_SET_PDEATHSIG = 1


def main(arguments: list[str] | None = None) -> int:
    """Run a subcommand. Exit status: 0, 2 after a UserError (one line on stderr), 130 after an interrupt, 141 where
    whoever read the output has left."""
    options = _parse(arguments)
    rank = int(os.environ.get("RANK", "0"))
    set_up_logging(rank, getattr(options, "logs", sys.stdout))
    try:
        status = options.job(options, rank)
        sys.stdout.flush()
        return status
    except UserError as error:
        logger.debug("%s", error)
        if not (rank and isinstance(error, SharedUserError)):
            print(f"{f'rank {rank}: ' if rank else ''}{error}", file=sys.stderr)
        return USER_ERROR_EXIT
    except KeyboardInterrupt:
        return INTERRUPT_EXIT
    except BrokenPipeError:
        if _has_reader():
            raise
        # Else the interpreter would write what is left, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _has_reader() -> bool:
    """Of the standard output."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return not any(events & select.POLLERR for _, events in poll.poll(0))


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="megatron-sse", description="Trains language models with SSE layers.")
    parser.add_argument("--version", action="version", version=__version__)
    jobs = parser.add_subparsers(required=True, metavar="JOB")
    train = jobs.add_parser("train", help="train a model", description="Train the model of a YAML file.")
    train.set_defaults(job=_train)
    check = jobs.add_parser(
        "check-parallel",
        help="compare layouts with one process",
        description="Run one training step of a YAML file's model, made small, in several layouts and compare each "
        "with one process. Exit status 1 where they differ. docs/check_parallel.md explains the output.",
    )
    check.set_defaults(job=_check_parallel)
    plan, doctor = _add_forecasts(jobs)
    for job in (train, check, plan, doctor):
        job.add_argument("config", metavar="CONFIG", help="YAML file; configs/reference.yaml documents every key")
        job.add_argument("overrides", metavar="section.key=value", nargs="*", help="settings put over the file's")
    check.add_argument("--as-is", action="store_true", help="keep the model's sizes")
    check.add_argument("--layouts", metavar="LIST", help="names of layouts, separated by commas; default all")
    check.add_argument("--tolerance", metavar="X", type=float, help="largest error allowed, of every tensor")
    check.add_argument("--json", metavar="FILE", type=Path, help="file to write all numbers to")
    _add_conversions(jobs)
    _add_generation(jobs)
    _add_evaluation(jobs)
    _add_data(jobs)
    look = jobs.add_parser(
        "inspect",
        help="show what is in a checkpoint",
        description="Show a checkpoint's tensors, layout, sizes and hashes. Exit status 1 where a file is damaged.",
    )
    look.set_defaults(job=_inspect)
    look.add_argument("checkpoint", metavar="DIR", help="a checkpoint, a folder of checkpoints or a run folder")
    look.add_argument("--tensors", action="store_true", help="list every tensor")
    look.add_argument("--sizes", action="store_true", help="check sizes, and hashes of files below 1 MiB only")
    _add_state_inspection(jobs)
    _add_plot(jobs)
    options, rest = parser.parse_known_args(arguments)
    # argparse takes no settings after an option.
    unknown = [argument for argument in rest if argument.startswith("-")]
    if unknown or (rest and not hasattr(options, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(unknown or rest)}")
    if rest:
        options.overrides += rest
    return options


def _add_forecasts(jobs: Any) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    plan = jobs.add_parser(
        "plan",
        help="memory, bytes and time of a run",
        description="What a run needs, from its YAML alone: parameters, memory, operations, bytes sent, time. "
        "Exit status 1 where it does not fit. docs/plan.md explains the output.",
    )
    plan.set_defaults(job=_plan)
    plan.add_argument("--gpus", metavar="N", type=int, help="number of GPUs; default as many as the layout asks for")
    plan.add_argument("--gpu", metavar="NAME", default="h100", help="a100, h100, h200 or b200; default h100")
    plan.add_argument("--memory", metavar="SIZE", help="memory of a GPU, such as 80GiB; default the GPU's")
    plan.add_argument("--tflops", metavar="X", type=float, help="1e12 operations per second; default the GPU's")
    plan.add_argument("--bandwidth", metavar="X", type=float, help="of the memory, TB per second; default the GPU's")
    plan.add_argument("--gpus-per-node", metavar="N", type=int, default=8, help="GPUs of a machine; default 8")
    plan.add_argument("--search", action="store_true", help="rank the layouts that fit")
    doctor = jobs.add_parser(
        "doctor",
        help="what would keep a run from starting",
        description="Check settings, token files, checkpoints, disk, versions and GPUs. Exit status 1 where something "
        "keeps the run from starting. docs/doctor.md explains the checks.",
    )
    doctor.set_defaults(job=_doctor)
    return plan, doctor


def _add_conversions(jobs: Any) -> None:
    convert = jobs.add_parser(
        "convert",
        help="convert models from and to Hugging Face folders",
        description="Convert a model into a new folder, and compare the logits of both. Exit status 1 where they "
        "differ. docs/convert.md explains the kinds of folders.",
    )
    convert.set_defaults(job=_convert)
    convert.add_argument("source", metavar="SRC", help="Hugging Face folder, checkpoint of ours, or run folder")
    convert.add_argument("target", metavar="DST", help="folder to make")
    convert.add_argument("overrides", metavar="model.sse.key=value", nargs="*", help="with --pattern: SSE settings")
    convert.add_argument("--to", metavar="KIND", help="ours, hf, sse, llama, qwen2, qwen3, mistral; default ours or hf")
    convert.add_argument("--pattern", metavar="LAYERS", help='make SSE layers of softmax layers: "5*sse, softmax"')
    convert.add_argument("--tolerance", metavar="X", type=float, help="largest difference allowed; default 1e-4")
    score = jobs.add_parser("score", help="logits of a model", description="Write a model's logits for given tokens.")
    score.set_defaults(job=_score)
    score.add_argument("--checkpoint", metavar="DIR", required=True, help="checkpoint of ours or Hugging Face folder")
    score.add_argument("--input", metavar="FILE", required=True, help="safetensors with input_ids [B, L]")
    score.add_argument(
        "--output", metavar="FILE", required=True, help="safetensors to write, logits [B, L, vocabulary]"
    )


def _add_generation(jobs: Any) -> None:
    generate = jobs.add_parser(
        "generate",
        help="generate text from a model",
        description="Go on with prompts: given here, from files, or, without any, line by line from the standard "
        "input. docs/generate.md explains the options.",
    )
    # The text goes to stdout.
    generate.set_defaults(job=_generate, logs=sys.stderr)
    generate.add_argument("checkpoint", metavar="CHECKPOINT", help="checkpoint, run folder or Hugging Face folder")
    generate.add_argument(
        "--prompt", metavar="TEXT", dest="prompts", action="append", default=[], help="may be repeated"
    )
    generate.add_argument(
        "--prompt-file", metavar="FILE", dest="prompt_files", action="append", default=[], help="text; may be repeated"
    )
    generate.add_argument("--tokens", metavar="FILE", help="token numbers, a line for each prompt; printed as numbers")
    generate.add_argument("--max-tokens", metavar="N", type=int, default=100, help="new tokens; default 100")
    generate.add_argument("--temperature", metavar="X", type=float, default=0.0, help="default 0: the likeliest token")
    generate.add_argument("--top-p", metavar="X", type=float, default=1.0, help="share of probability kept; default 1")
    generate.add_argument("--seed", metavar="N", type=int, default=0, help="of the random numbers; default 0")
    generate.add_argument(
        "--chunk", metavar="N", type=int, default=2048, help="tokens of prompts at once; default 2048"
    )
    generate.add_argument(
        "--context", metavar="N", type=int, default=1, help="processes that share long prompts; default 1"
    )
    generate.add_argument("--precision", choices=("fp32", "bf16"), help="default the checkpoint's")
    generate.add_argument(
        "--any-length", action="store_true", help="go beyond the length that the model was trained on"
    )
    generate.add_argument("--save-cache", metavar="FILE", help="file to write the sequences' states to")
    generate.add_argument("--load-cache", metavar="FILE", help="states to go on from")


def _add_evaluation(jobs: Any) -> None:
    evaluate = jobs.add_parser(
        "evaluate",
        help="measure what a model predicts and recalls",
        description="Loss by position (perplexity), associative recall (mqar), numbers hidden in long texts (needle). "
        "Lists are numbers with commas. docs/evaluate.md explains the tasks.",
    )
    # The tables go to stdout.
    evaluate.set_defaults(job=_evaluate, logs=sys.stderr)
    evaluate.add_argument("checkpoint", metavar="CHECKPOINT", help="checkpoint, run folder or Hugging Face folder")
    evaluate.add_argument("tasks", metavar="TASK", nargs="+", help="perplexity, mqar, needle")
    evaluate.add_argument("--output", metavar="FOLDER", default="evaluation", help="for JSON and PNG files")
    evaluate.add_argument("--lengths", metavar="LIST", help="tokens of a sequence; default the model's own")
    evaluate.add_argument("--data", metavar="PREFIX", help="perplexity: token file; default the model's validation")
    evaluate.add_argument(
        "--tokens", metavar="N", type=int, default=1 << 18, help="perplexity: of the file; default 262144"
    )
    evaluate.add_argument("--pairs", metavar="LIST", help="mqar: pairs in a sequence; default as trained, or 32")
    evaluate.add_argument("--keys", metavar="N", type=int, help="mqar: keys to choose from; default as trained, or 64")
    evaluate.add_argument("--values", metavar="N", type=int, help="mqar: values; default as trained, or 32")
    evaluate.add_argument("--variants", metavar="LIST", help="needle: default as trained, or all")
    evaluate.add_argument("--depths", metavar="LIST", default="0,25,50,75,100", help="needle: percent of the text")
    evaluate.add_argument("--digits", metavar="N", type=int, help="needle: of a number; default as trained, or 7")
    evaluate.add_argument("--samples", metavar="N", type=int, default=20, help="of each cell; default 20")
    evaluate.add_argument("--seed", metavar="N", type=int, default=0, help="of the samples; default 0")
    evaluate.add_argument("--batch", metavar="N", type=int, default=8, help="sequences at once; default 8")
    evaluate.add_argument("--chunk", metavar="N", type=int, default=2048, help="of their tokens at once; default 2048")
    evaluate.add_argument("--precision", choices=("fp32", "bf16"), help="default the checkpoint's")
    evaluate.add_argument("--any-length", action="store_true", help="go beyond the length that it was trained on")


def _add_state_inspection(jobs: Any) -> None:
    look = jobs.add_parser(
        "inspect-states",
        help="show what SSE layers do with a text",
        description="Use of partitions, effective rank of the states, half-lives of their decay, layer by layer, over "
        "all tokens of some texts. docs/states.md explains the numbers.",
    )
    # The tables go to stdout.
    look.set_defaults(job=_inspect_states, logs=sys.stderr)
    look.add_argument("checkpoint", metavar="CHECKPOINT", help="checkpoint, run folder or Hugging Face folder")
    look.add_argument("--prompt", metavar="TEXT", dest="prompts", action="append", default=[], help="may be repeated")
    look.add_argument(
        "--prompt-file", metavar="FILE", dest="prompt_files", action="append", default=[], help="text; may be repeated"
    )
    look.add_argument("--tokens", metavar="FILE", help="token numbers, a line for each text")
    look.add_argument("--output", metavar="FOLDER", default="states", help="for JSON and PNG files; default states")
    look.add_argument("--chunk", metavar="N", type=int, default=2048, help="tokens of a text at once; default 2048")
    look.add_argument("--precision", choices=("fp32", "bf16"), help="default the checkpoint's")
    look.add_argument("--any-length", action="store_true", help="go beyond the length that it was trained on")


def _add_plot(jobs: Any) -> None:
    plot = jobs.add_parser(
        "plot",
        help="draw runs side by side",
        description="Draw loss, speed, memory, partition load and layouts of runs, from their TensorBoard events, as "
        "PNG files and one HTML page. docs/observe.md explains the pictures.",
    )
    plot.set_defaults(job=_plot)
    plot.add_argument("runs", metavar="RUN", nargs="+", help="run folder (monitor.folder)")
    plot.add_argument("--output", metavar="FOLDER", default="plot", help="folder to write to; default plot")


def _add_data(jobs: Any) -> None:
    data = jobs.add_parser("data", help="build token files and look into them", description="Token files.")
    kinds = data.add_subparsers(required=True, metavar="WHAT")
    build = kinds.add_parser(
        "build",
        help="make a token file of text",
        description="Make PREFIX.bin, .idx and .json of JSONL, Parquet, text files and folders of source files. In a "
        "folder that is read as source files each sub-folder, with all files below it, is one document, and so is "
        "each file beside them. The same command goes on after a kill. docs/data.md explains the options.",
    )
    build.set_defaults(job=_build_data)
    build.add_argument("inputs", metavar="INPUT", nargs="+", help=".jsonl, .jsonl.gz, .parquet, text file or folder")
    build.add_argument("--output", metavar="PREFIX", required=True, help="of the files to write")
    build.add_argument("--tokenizer", metavar="WHICH", default="bytes", help="bytes, tokenizer.json or its folder")
    build.add_argument("--end", metavar="NAME", help="token that ends a document; default the tokenizer's eos_token")
    build.add_argument("--format", metavar="NAME", default="auto", help="auto, jsonl, text, parquet, folder or chat")
    build.add_argument("--field", metavar="NAME", default="text", help="of JSONL and Parquet; default text")
    build.add_argument("--chat-template", metavar="FILE", help="Jinja; default the tokenizer's")
    build.add_argument("--wrong", metavar="HOW", default="refuse", help="wrong input: refuse (default) or skip")
    build.add_argument("--empty", metavar="HOW", default="skip", help="empty documents: refuse or skip (default)")
    build.add_argument("--workers", metavar="N", type=int, help="processes; default one per core")
    look = kinds.add_parser(
        "inspect",
        help="show what is in a token file",
        description="Check a token file and show its sizes, the lengths of its documents, and documents as text.",
    )
    look.set_defaults(job=_inspect_data)
    look.add_argument("prefix", metavar="PREFIX", help="of the .bin and .idx file")
    look.add_argument("--documents", metavar="N", type=int, default=1, help="documents to show; default 1")
    look.add_argument("--first", metavar="K", type=int, default=0, help="the first of them, from 0; default 0")
    look.add_argument("--tokens", metavar="N", type=int, default=500, help="tokens shown of each; default 500")


def _train(options: argparse.Namespace, rank: int) -> int:
    # Without its launcher a process would keep its GPU, and the others would wait for it.
    if "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    config = load_config(options.config, options.overrides)
    description = describe_run(config, int(os.environ.get("WORLD_SIZE", "1")))
    open_log(config, f"rank_{rank:05d}")
    if rank == 0:
        for line in description:
            logger.info(line)
        for line in ignored_settings(config):
            logger.warning(line)
    # Imported late: a wrong setting is answered before Megatron-Core is loaded.
    from megatron_sse.training import train

    if "RANK" not in os.environ:
        from megatron_sse.launch.prepare import prepare_data

        prepare_data(config)
    return train(config)


def _check_parallel(options: argparse.Namespace, rank: int) -> int:
    config = load_config(options.config, options.overrides)
    names = None if options.layouts is None else [name.strip() for name in options.layouts.split(",")]
    from megatron_sse.check_parallel import check_parallel

    # Like an interrupt, so that the processes that it started end with it.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    return check_parallel(config, names, options.as_is, options.tolerance, options.json)


def _plan(options: argparse.Namespace, rank: int) -> int:
    config = load_config(options.config, options.overrides)
    from megatron_sse.plan import plan

    return plan(
        config,
        options.gpu,
        options.gpus,
        options.memory,
        options.tflops,
        options.bandwidth,
        options.gpus_per_node,
        options.search,
    )


def _doctor(options: argparse.Namespace, rank: int) -> int:
    from megatron_sse.doctor import examine

    return examine(options.config, options.overrides)


def _convert(options: argparse.Namespace, rank: int) -> int:
    from megatron_sse.convert import convert
    from megatron_sse.convert.command import TOLERANCE

    tolerance = TOLERANCE if options.tolerance is None else options.tolerance
    return convert(options.source, options.target, options.to, options.pattern, options.overrides, tolerance)


def _score(options: argparse.Namespace, rank: int) -> int:
    from megatron_sse.score.command import score

    return score(options.checkpoint, options.input, options.output)


def _generate(options: argparse.Namespace, rank: int) -> int:
    from megatron_sse.inference.command import Request, run

    given = vars(options).items()
    return run(Request(**{name: value for name, value in given if name not in ("job", "logs")}))


def _evaluate(options: argparse.Namespace, rank: int) -> int:
    from megatron_sse.evaluation.command import run
    from megatron_sse.evaluation.request import Request

    given = vars(options).items()
    return run(Request(**{name: value for name, value in given if name not in ("job", "logs")}))


def _build_data(options: argparse.Namespace, rank: int) -> int:
    from megatron_sse.data.builder.command import Request, build

    given = vars(options).items()
    return build(Request(**{name: value for name, value in given if name != "job"}))


def _inspect_data(options: argparse.Namespace, rank: int) -> int:
    from megatron_sse.data.command import inspect

    return inspect(options.prefix, options.documents, options.first, options.tokens)


def _inspect(options: argparse.Namespace, rank: int) -> int:
    from megatron_sse.checkpoint.command import inspect

    return inspect(options.checkpoint, options.tensors, hashes=not options.sizes)


def _inspect_states(options: argparse.Namespace, rank: int) -> int:
    from megatron_sse.inspection.command import Request, run

    given = vars(options).items()
    return run(Request(**{name: value for name, value in given if name not in ("job", "logs")}))


def _plot(options: argparse.Namespace, rank: int) -> int:
    from megatron_sse.plot import plot

    return plot(options.runs, options.output)
