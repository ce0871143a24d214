"""Evaluation of models that were trained on the tasks."""

import json
import os
import subprocess
import sys
from pathlib import Path

from megatron_sse.cli import main
from megatron_sse.config import MQARTask, NeedleTask
from megatron_sse.evaluation.request import Request
from megatron_sse.evaluation.tasks import needle_tasks, recall_tasks
from megatron_sse.pretrained.text import ByteTokenizer
from tests.data.files import run_config

ROOT = Path(__file__).resolve().parents[2]
EASY = [
    *("model.num_layers=1", "model.layers=gla", "model.hidden_size=32", "data.sequence_length=6"),
    *("data.train.mqar={pairs: 2, keys: 4, values: 4}", "data.validation=null", "training.steps=60"),
    *("training.global_batch_size=64", "training.micro_batch_size=64", "optimizer.schedule=constant"),
    *("optimizer.learning_rate=0.01", "optimizer.warmup_steps=5", "monitor.tensorboard=false"),
    "model.embedding_init_std=0.1",
]


def test_a_model_learns_to_recall(tmp_path: Path) -> None:
    train = [sys.executable, "-m", "megatron_sse", "train", str(ROOT / "configs" / "recall_mqar.yaml"), *EASY]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*train, f"monitor.folder={tmp_path}/run"], env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    # Keys, values and pairs default to those of training.
    options = ["--samples", "50", "--output", str(tmp_path / "out")]
    assert main(["evaluate", str(tmp_path / "run"), "mqar", *options]) == 0
    [recalled] = json.loads((tmp_path / "out" / "results.json").read_text())["mqar"]
    assert (recalled["length"], recalled["pairs"], recalled["chance"]) == (6, 2, 0.25)
    assert sum(distance["questions"] for distance in recalled["distances"]) == 100
    assert recalled["accuracy"] > 0.95


def test_tasks_are_as_trained_unless_given() -> None:
    mqar, needle = {"pairs": 3, "keys": 7, "values": 5}, {"variant": "multi_value", "digits": 4}
    config = run_config("x", data={"train": [{"mqar": mqar}, {"needle": needle}]}, model={"vocab_size": 257})
    plain = Request(checkpoint="", tasks=("mqar",))
    assert recall_tasks(plain, config, [16]) == [MQARTask(**mqar)]
    assert needle_tasks(plain, config, [512], ByteTokenizer()) == [NeedleTask(variant="multi_value", digits=4)]
    given = Request(checkpoint="", tasks=("mqar",), pairs="5,4", values=6, variants="single,multi_key", digits=2)
    assert recall_tasks(given, config, [16]) == [MQARTask(pairs=pairs, keys=7, values=6) for pairs in (4, 5)]
    found = needle_tasks(given, config, [512], ByteTokenizer())
    assert found == [NeedleTask(variant=variant, digits=2) for variant in ("single", "multi_key")]
    other = run_config("x", model={"vocab_size": 257})
    assert recall_tasks(plain, other, [96]) == [MQARTask(pairs=32, keys=64, values=32)]
    assert len(needle_tasks(plain, other, [512], ByteTokenizer())) == 4
