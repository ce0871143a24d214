"""The table of recurrences is checked when it is imported."""

from pathlib import Path

import pytest

from megatron_sse import recurrence

WRONG = {
    "a name without a row": ('"kda"]', '"kda", "other"]', "RecurrenceName and the table of recurrences differ"),
    "two rows of the same facts": (
        "delta_rule=True, channel_decay=False",
        "delta_rule=True, channel_decay=True",
        "two",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_table_is_not_imported(name: str) -> None:
    old, new, message = WRONG[name]
    source = Path(recurrence.__file__).read_text()
    assert source.count(old) == 1
    with pytest.raises(ImportError, match=message):
        exec(source.replace(old, new), {"__name__": "seeded"})
