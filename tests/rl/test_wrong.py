"""Prompts and rewards that are wrong: one line that says what, before anything is generated where it can be."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from megatron_sse.config.rl import Reward
from megatron_sse.data.problems import Problem, read_problems
from megatron_sse.errors import SharedUserError, UserError, found_by_machine
from megatron_sse.launch.start import start
from megatron_sse.rl.rewards import Scorer
from megatron_sse.rl.run import open_problems
from tests.rl.support import policy_config

GOOD = {"prompt": "2+2=", "answer": "4"}
LINES = {
    '{"prompt": "2+2="}': "answer: got nothing, allowed a text or a number",
    '{"prompt": "2+2=", "answer": " "}': "answer: got an empty text",
    '{"prompt": "2+2=", "answer": ["4"]}': "answer: got list",
    '{"answer": "4"}': "got neither, allowed either prompt or messages",
    '{"prompt": "a", "messages": [], "answer": "4"}': "got both",
    '{"messages": [{"role": "user"}], "answer": "4"}': "messages: allowed a list of at least one {role, content}",
    '{"prompt": 4, "answer": "4"}': "prompt: got int, allowed a text",
    '["prompt"]': "got a JSON list, allowed an object",
    "{": "broken JSON",
}


@pytest.mark.parametrize("line", LINES)
def test_lines(line: str, tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(f"{json.dumps(GOOD)}\n\n{line}\n")
    with pytest.raises(UserError) as error:
        read_problems("rl.prompts", str(file))
    assert str(error.value).startswith(f"{file}:3: ") and LINES[line] in str(error.value)


def test_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="rl.prompts: .* cannot be read"):
        read_problems("rl.prompts", str(tmp_path / "none"))
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(UserError, match="rl.prompts: .* is empty"):
        read_problems("rl.prompts", str(tmp_path / "empty"))
    config = policy_config(tmp_path / "run", rl={"max_new_tokens": 31})
    with pytest.raises(UserError, match="got a prompt of 2 tokens, allowed 1 to 1, what rl.max_new_tokens leaves"):
        open_problems(config)


def test_parquet(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "2+2?"}]
    file = tmp_path / "p.parquet"
    rows = [{"prompt": "2+2=", "messages": None, "answer": "4"}, {"prompt": None, "messages": turns, "answer": "4"}]
    parquet.write_table(pyarrow.Table.from_pylist([row | {"other": 1} for row in rows]), file)
    plain, chat = read_problems("rl.prompts", str(file))
    assert plain == Problem("2+2=", None, "4", f"{file}:1") and chat == Problem("2+2?", turns, "4", f"{file}:2")
    parquet.write_table(pyarrow.Table.from_pylist([rows[0], rows[0] | {"answer": None}]), file)
    with pytest.raises(UserError, match="p.parquet:2: answer: got nothing"):
        read_problems("rl.prompts", str(file))
    parquet.write_table(pyarrow.Table.from_pylist([{"question": "2+2="}]), file)
    with pytest.raises(UserError, match="p.parquet"):
        read_problems("rl.prompts", str(file))
    file.write_text("no Parquet")
    with pytest.raises(UserError, match="rl.prompts: .*p.parquet cannot be read as Parquet"):
        read_problems("rl.prompts", str(file))
    with pytest.raises(UserError, match="rl.prompts: .*none.parquet cannot be read"):
        read_problems("rl.prompts", str(tmp_path / "none.parquet"))


def nan(*_: str) -> float:
    return float("nan")


def failing(*_: str) -> float:
    raise KeyError("lost")


def half(prompt: str, completion: str, answer: str) -> float:
    return 0.5 if completion else 0.0


PROBLEM = Problem("2+2=", None, "4", "p.jsonl:3")


def score(*rewards: dict[str, Any] | str, completion: str) -> float:
    given = [Reward.model_validate({"function": each} if isinstance(each, str) else each) for each in rewards]
    return Scorer(given)(PROBLEM, completion)


def test_rewards() -> None:
    for function, reason in ((nan, "returned nan, allowed a finite"), (failing, r"raised KeyError \('lost'\)")):
        name = f"tests.rl.test_wrong:{function.__name__}"
        with pytest.raises(UserError, match=f"rl.reward: {name} {reason}.* for the prompt of p.jsonl:3"):
            score(name, completion="4")
    imports = {"nowhere:f": "ModuleNotFoundError", "json:none": "AttributeError", "json:__name__": "no function"}
    for name, reason in imports.items():
        with pytest.raises(UserError, match=f"rl.reward: .*{reason}"):
            score(name, completion="4")
    with pytest.raises(ValueError, match="allowed exact, math or module:function"):
        Reward.model_validate({"function": "best"})
    assert [score("exact", completion=text) for text in ("2+2\n 4 \n", "4\n5", "", "14")] == [1, 0, 0, 0]
    both = ("exact", {"function": "tests.rl.test_wrong:half", "weight": -2})
    assert score(*both, completion="4") == 0 and score(*both, completion="5") == -1


def test_a_reward_in_the_folder_where_the_command_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The console script does not have that folder on its path."""
    (tmp_path / "rewards_of_mine.py").write_text("def always(*_):\n    return 1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    assert score("rewards_of_mine:always", completion="4") == 1


def test_every_machine_reports_what_only_it_may_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first process of a machine does; to the others on it the error is known."""
    for local_rank, kind in (("0", UserError), ("1", SharedUserError)):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        with pytest.raises(UserError, match="ModuleNotFoundError") as error, found_by_machine():
            score("nowhere:f", completion="4")
        assert type(error.value) is kind


def test_a_refused_run_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = policy_config(tmp_path, rl={"prompts": str(tmp_path / "none")})
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with pytest.raises(UserError, match="rl.prompts: .*none cannot be read"):
        start(config, [])
    folder = Path(config.monitor.folder)
    assert not folder.exists()
    # What was there before stays.
    folder.mkdir()
    with pytest.raises(UserError, match="rl.prompts"):
        start(config, [])
    assert folder.is_dir()


def test_math() -> None:
    half = Problem("?", None, r"\frac{1}{2}", "p:1")
    scorer = Scorer([Reward(function="math")])
    assert [scorer(half, text) for text in (r"so \boxed{0.5}", "the answer is $1/2$", r"\boxed{2}", "")] == [1, 1, 0, 0]
