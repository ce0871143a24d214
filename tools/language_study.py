"""The study of language modelling: trains every arm of tools/language_arms.py on real text, and writes a report.

    python -m megatron_sse.tools.language_study --output docs/evidence_language --workers 2

The text is that of Python's own standard library (tools/language_corpus.py), made on the first start. Each arm is
trained with every learning rate and seed 0. The learning rate with the least validation loss then gets the other seeds.
A run takes about five minutes on one core. It is trained by `megatron-sse train` in OUTPUT/ARM/lr_X_seed_S, on one
thread, with a log in train.log; then it is measured on the test text (tools/language_measure.py), its checkpoints are
removed, and result.json stays. The same command resumes after an interrupt: finished runs are skipped, even if only
OUTPUT/results.json has them; others resume at their last checkpoint. Settings after the options hold for all arms. The
report (report.md, results.json and plots, which need the `plot` extra) covers all results in OUTPUT; `--report` writes
it without training. Exit status 0; 1 where a run failed, 2 for a wrong request.
"""

from __future__ import annotations

import argparse

from megatron_sse.config import load_config
from megatron_sse.data.checks import check_token_file
from megatron_sse.errors import UserError
from megatron_sse.tools.language_arms import ARMS, LEARNING_RATES, arm_settings
from megatron_sse.tools.language_corpus import TEST, TRAINING, make_corpus
from megatron_sse.tools.studies.command import find_arms, make_parser, run_main, run_study
from megatron_sse.tools.studies.rates import add_rates, parse_rates, read_results, train_by_rate
from megatron_sse.tools.studies.runs import ROOT


def main(arguments: list[str] | None = None) -> int:
    """Run the study and return the exit status (see the module)."""
    parser = make_parser(__doc__, ARMS, 3, ROOT / "configs" / "language_study.yaml")
    add_rates(parser, LEARNING_RATES)
    parser.add_argument("--test", metavar="PREFIX", default=TEST, help=f"token file to measure on; default {TEST}")
    parser.add_argument("--tokens", type=int, default=1 << 18, help="tokens of it; default 262144")
    options = parser.parse_args(arguments)

    def report() -> str:
        from megatron_sse.tools.language_report import write_report

        return write_report(options.output, read_results(options, ARMS))

    return run_study(options, ("seeds", "workers", "tokens"), lambda: _train(options), report)


def _train(options: argparse.Namespace) -> int:
    """Train the runs that have no result yet, and return how many failed. Raises UserError."""
    # Before the tokens are made.
    parse_rates(options.rates)
    arms = find_arms(options.arms, ARMS)
    settings = {arm: arm_settings(arm, options.config, options.settings) for arm in arms}
    config = load_config(options.config, options.settings)
    for name, sources in (("train", config.data.train), ("validation", config.data.validation or [])):
        if len(sources) != 1 or sources[0].prefix is None:
            raise UserError(f"data.{name}: got {len(sources)} sources, allowed one token file, which is measured on")
    if config.data.train[0].prefix == TRAINING:
        make_corpus(config.model.vocab_size)
    check_token_file("--test", options.test, config.model.vocab_size)
    measure = ("megatron_sse.tools.language_measure", "--test", options.test, "--tokens", str(options.tokens))
    return train_by_rate(options, settings, measure, lambda measured: measured)


if __name__ == "__main__":
    run_main(main)
