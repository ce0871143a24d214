"""Recall tasks: correct answers, samples determined by seed and number, and use as data like token files."""

import re
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_sse.config import MQARTask, NeedleTask, RunConfig, plan_stages
from megatron_sse.data.blend import TrainingOrder
from megatron_sse.data.fingerprint import describe_data
from megatron_sse.data.iterators import build_data_iterators
from megatron_sse.data.sources import check_data, open_training, open_validation
from megatron_sse.data.tasks.mqar import Recall, make_recall
from megatron_sse.data.tasks.needle import VARIANTS, Needle, least_room, make_needle, score_answer
from megatron_sse.data.tokenizer import END_OF_DOCUMENT, decode
from megatron_sse.doctor.command import find_all
from megatron_sse.doctor.finding import GOOD
from megatron_sse.doctor.request import Request
from megatron_sse.errors import UserError
from tests.data.files import data_parallel_groups, random_documents, run_config, write_tokens

TASK = MQARTask(pairs=5, keys=9, values=4)
MQAR = {"mqar": {"pairs": 4, "keys": 8, "values": 6}}
NEEDLE = {"needle": {"digits": 3}}


def draw(number: int, length: int = 40, task: MQARTask = TASK) -> Recall:
    return make_recall(np.random.default_rng([1, number]), task, length)


@pytest.mark.parametrize("length", [15, 16, 40])
def test_every_key_is_asked_for_once_and_its_value_is_the_answer(length: int) -> None:
    pairs, gap = TASK.pairs, TASK.keys + TASK.values
    for number in range(100):
        recall = draw(number, length)
        tokens = recall.tokens_E.tolist()
        assert len(tokens) == length and tokens.count(gap) == length - 3 * pairs
        keys = [(place, token) for place, token in enumerate(tokens) if token < TASK.keys]
        # Pairs come first, then the questions.
        given = {token: place for place, token in keys[:pairs]}
        asked = {token: place for place, token in keys[pairs:]}
        assert len(given) == pairs and given.keys() == asked.keys()
        assert recall.place_p.tolist() == list(asked.values())
        values = [tokens[given[token] + 1] for token in asked]
        assert recall.answer_p.tolist() == values and all(TASK.keys <= value < gap for value in values)
        distances = [place - given[token] - 1 for token, place in asked.items()]
        assert recall.distance_p.tolist() == distances and min(distances) >= 1


def test_samples_follow_from_the_seed() -> None:
    assert np.array_equal(draw(3).tokens_E, draw(3).tokens_E)
    assert len({draw(number).tokens_E.tobytes() for number in range(50)}) == 50
    # Keys, orders and gaps are distributed evenly.
    tokens_nE = np.stack([draw(number).tokens_E for number in range(400)])
    assert np.bincount(tokens_nE[tokens_nE < TASK.keys]).min() > 0.8 * 400 * 2 * TASK.pairs / TASK.keys
    gaps_E = (tokens_nE == TASK.keys + TASK.values).mean(0)
    assert 0.4 < gaps_E.min() and gaps_E.max() < 0.9


def solve(needle: Needle) -> list[str]:
    """Solve a needle task by reading its text, and return the answer."""
    text, question = needle.prompt.rsplit("\n", 1)
    names = re.fullmatch(r"The magic numbers? of (.*) (?:is|are)", question)[1].split(", ")
    facts = re.findall(r"The magic number of (\S+) is (\d+)\. ", text)
    return [number for name, number in facts if name in names]


@pytest.mark.parametrize("variant", VARIANTS)
def test_needles_can_be_found(variant) -> None:
    task = NeedleTask(variant=variant, digits=5)
    names, each, asked = VARIANTS[variant]
    least = least_room(task, len)
    for number in range(60):
        room = least + 10 * number
        needle = make_needle(np.random.default_rng(number), task, room, None, len)
        assert room - 60 < len(needle.prompt + needle.answer) <= room
        facts = re.findall(r"The magic number of (\S+) is (\d{5})\. ", needle.prompt)
        assert len(facts) == names * each and len({name for name, _ in facts}) == names
        assert len({found for _, found in facts}) == names * each
        found = solve(needle)
        assert tuple(found) == needle.numbers and len(found) == asked * each
        assert needle.answer == f" {', '.join(found)}." and score_answer(needle.answer, needle.numbers) == 1
    again = make_needle(np.random.default_rng(number), task, room, None, len)
    assert again == needle


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_the_first_number_is_at_its_depth(depth: float) -> None:
    for variant in VARIANTS:
        needle = make_needle(np.random.default_rng(7), NeedleTask(variant=variant), 4000, depth, len)
        text = needle.prompt.rsplit("\n", 1)[0]
        places = [text.index(f" {number}.") / len(text) for number in needle.numbers]
        assert min(abs(place - depth) for place in places) < 0.03


def test_scores() -> None:
    assert score_answer(" 12, 34.", ("34", "12")) == 1
    assert score_answer(" 12, 345.", ("34", "12")) == 0.5
    assert score_answer(" 99. 12", ("12",)) == 0 and score_answer("", ("12",)) == 0
    assert score_answer("120", ("12",)) == 0


def test_only_answers_are_labels() -> None:
    config = run_config("x", data={"train": MQAR}, model={"vocab_size": 15})
    batch = next(build_data_iterators(plan_stages(config)[0], data_parallel_groups(), 0)[0])
    assert batch.loss_tokens == 2 * 4 == int(batch.loss_mask_BL.sum())
    assert torch.equal(batch.answers_BL, batch.loss_mask_BL > 0)
    for tokens_E, labels_E, mask_E in zip(batch.tokens_BL, batch.labels_BL, batch.loss_mask_BL, strict=True):
        asked = mask_E.nonzero()[:, 0].tolist()
        tokens = tokens_E.tolist()
        for place in asked:
            first = tokens.index(tokens[place])
            assert first < place and labels_E[place] == tokens[first + 1]
    assert batch.layout.num_documents == 2
    assert batch.layout.real_BL is None or bool(batch.layout.real_BL.all())


def test_needle_samples_are_texts_with_an_end() -> None:
    data = {"train": {"needle": {"variant": "multi_key", "digits": 3}}, "sequence_length": 300}
    config = run_config("x", data=data, model={"vocab_size": 257})
    blend = open_training(plan_stages(config)[0])
    for number in range(20):
        sample = blend.datasets[0][number]
        tokens_E, counts_E = sample.tokens_E1[: sample.length], sample.counts_E1[: sample.length]
        assert tokens_E[-1] == END_OF_DOCUMENT and not sample.counts_E1[sample.length :].any()
        answer = decode(tokens_E[counts_E])
        prompt = decode(tokens_E[~counts_E])
        assert solve(Needle(prompt, answer, ())) == [answer.strip(" .")]
        assert np.flatnonzero(sample.starts_E1).tolist() == [0, *[sample.length] * (sample.length < 301)]
        assert 240 < sample.length <= 301 and sample.of_task


def samples_of(config: RunConfig, data_size: int, consumed: int, count: int) -> list[tuple[int, ...]]:
    """Return the tokens of `count` samples in the order of the run, collected from all ranks."""
    stage, found = plan_stages(config)[0], []
    ranks = [
        build_data_iterators(stage, data_parallel_groups(rank, data_size), consumed)[0] for rank in range(data_size)
    ]
    while len(found) < count:
        for rank in ranks:
            found += [tuple(tokens) for tokens in next(rank).tokens_BL.tolist()]
    return found


def test_the_same_order_at_any_layout_and_after_a_resume(tmp_path: Path) -> None:
    prefix = str(tmp_path / "file")
    write_tokens(prefix, random_documents(60, 40))
    blend = [{"prefix": prefix, "weight": 1.0}, MQAR | {"weight": 3.0}]
    config = run_config("x", data={"train": blend})
    expected = samples_of(config, 1, 0, 64)
    assert samples_of(config, 2, 0, 64) == expected == [*expected[:32], *samples_of(config, 2, 32, 32)]
    order = TrainingOrder(open_training(plan_stages(config)[0]), [5, 0])
    made = [position for position in range(64) if order[position].labels_E1 is not None]
    assert len(made) == 48 and len({expected[position] for position in made}) == 48
    other = run_config("x", data={"train": blend}, training={"seed": 6})
    assert not {expected[position] for position in made} & set(samples_of(other, 1, 0, 64))


def test_validation_has_samples_of_its_own() -> None:
    config = run_config("x", data={"train": MQAR, "validation": MQAR})
    held_out = open_validation(config)
    tokens = {tuple(held_out[position].tokens_E1[:-1].tolist()) for position in range(64)}
    assert len(tokens) == 64 and not tokens & set(samples_of(config, 1, 0, 64))
    other = open_validation(run_config("x", data={"train": MQAR, "validation": MQAR}, training={"seed": 6}))
    assert tokens == {tuple(other[position].tokens_E1[:-1].tolist()) for position in range(64)}


def test_stages_of_a_task_and_a_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    prefix = str(tmp_path / "file")
    write_tokens(prefix, random_documents(60, 40))
    values = run_config(prefix).model_dump()
    values["data"]["sequence_length"] = values["training"]["steps"] = None
    stages = [{"tokens": 256, "sequence_length": 16}, {"tokens": 512, "sequence_length": 32, "train": MQAR}]
    config = RunConfig.model_validate(values | {"stages": stages})
    with caplog.at_level("INFO"):
        check_data(config)
    assert "stage 2: stages.1.train: mqar: 16 samples" in caplog.text
    first, second = plan_stages(config)
    assert open_training(first).datasets[0][0].labels_E1 is None
    sample = open_training(second).datasets[0][0]
    assert sample.length == 33 and sample.counts_E1.sum() == 4
    assert describe_data(first)["files"][0]["prefix"] == prefix


def test_fingerprint_and_doctor(tmp_path: Path) -> None:
    def describe(**sizes: int) -> str:
        config = run_config("x", data={"train": {"mqar": MQAR["mqar"] | sizes}})
        return describe_data(plan_stages(config)[0])["files"][0]["hash"]

    assert describe() == describe() and len({describe(), describe(pairs=3), describe(values=7)}) == 3
    path = tmp_path / "run.yaml"
    path.write_text(run_config(str(tmp_path / "x"), data={"train": MQAR}).to_yaml())
    found = {finding.name: finding for finding in find_all(Request(config=str(path)))}
    assert found["data.train"].mark == GOOD and found["data.train"].text.startswith("mqar")


WRONG = {
    "at most its 3 keys": ({"mqar": {"pairs": 4, "keys": 3, "values": 6}}, 64),
    "and 5, a third of data.sequence_length": ({"mqar": {"pairs": 6, "keys": 9, "values": 6}}, 64),
    "allowed 15 or more: data.train.0.mqar": (MQAR, 14),
    "allowed 257 or more: data.train.0.needle": (NEEDLE, 256),
    "got none of them, allowed one of prefix, mqar, needle": ({"weight": 1.0}, 64),
    "got prefix and mqar, allowed one of": ({"prefix": "a"} | MQAR, 64),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_tasks(message: str) -> None:
    source, vocab_size = WRONG[message]
    with pytest.raises(ValueError, match=re.escape(message)):
        run_config("x", data={"train": source}, model={"vocab_size": vocab_size})


def test_a_needle_needs_room() -> None:
    config = run_config("x", data={"train": NEEDLE, "sequence_length": 50}, model={"vocab_size": 257})
    with pytest.raises(UserError, match=r"data\.train: got data\.sequence_length 50, allowed \d+ or more for needle"):
        open_training(plan_stages(config)[0])


def test_validation_and_training_of_a_share(tmp_path: Path) -> None:
    prefix = str(tmp_path / "file")
    write_tokens(prefix, random_documents(600, 40))
    data = {"train": [{"prefix": prefix}, MQAR], "validation_share": 0.5}
    config = run_config("x", data=data, training={"validation_batches": 1})
    _, make_validation = build_data_iterators(plan_stages(config)[0], data_parallel_groups(), 0)
    batches = list(islice(make_validation(), 99))
    assert len(batches) == 4 and min(batch.loss_tokens for batch in batches) >= 4
    # Half of the 8 samples come from the task.
    assert sum(int(batch.answers_BL.sum()) for batch in batches) == 4 * 4
