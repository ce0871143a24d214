"""The recurrences that the states of SSE layers can follow. What is specific to one of them derives from its row here.

S is the state [K, V] of one head of one bank, a a decay in [0, 1], b a write strength:
    gla  S <- diag(a) S + k^T v                             o = q S / sqrt(K)    (arXiv 2312.06635)
    gdn  S <- a S + b k^T (v - k a S)                       the same             (arXiv 2412.06464)
    kda  S <- diag(a) S + b k^T (v - k diag(a) S)           the same             (arXiv 2510.26692)
"""

from dataclasses import dataclass
from typing import Final, Literal, get_args

RecurrenceName = Literal["gla", "gdn", "kda"]


@dataclass(frozen=True)
class Recurrence:
    """Facts about one recurrence.

    delta_rule: a write replaces what its key recalls, b (v - k S) in place of v. Queries and keys are L2-normalised and
        a chunk's transition is a matrix [K, K]. Otherwise writes add up and the transition is diagonal.
    channel_decay: every key channel has a decay of its own, computed by a low-rank gate; otherwise every head has one.
    key_map: what is applied to keys unless model.sse.key_map is set.
    has_triton: whether kernels/triton has operators and a decode step; without, GPUs run the torch forms.
    """

    name: RecurrenceName
    delta_rule: bool
    channel_decay: bool
    key_map: Literal["softmax", "silu"]
    has_triton: bool

    @property
    def scalars(self) -> tuple[str, ...]:
        """What the input projection yields for every value head and kind of bank beside q, k and v."""
        return ("decay",) * (not self.channel_decay) + ("beta",) * self.delta_rule

    @property
    def write_products(self) -> int:
        """Products of a vector with a [K, V] state that one write takes: k^T v, and k S for the delta rule."""
        return 1 + self.delta_rule

    @property
    def hand_off_factor(self) -> int:
        """Times the bytes of a state that a hand-off between context ranks moves: a transition matrix counts as one."""
        return 2 + self.delta_rule


RECURRENCES: Final[dict[str, Recurrence]] = {
    row.name: row
    for row in (
        Recurrence("gla", delta_rule=False, channel_decay=True, key_map="softmax", has_triton=True),
        Recurrence("gdn", delta_rule=True, channel_decay=False, key_map="silu", has_triton=True),
        Recurrence("kda", delta_rule=True, channel_decay=True, key_map="silu", has_triton=True),
    )
}
if RECURRENCES.keys() != set(get_args(RecurrenceName)):
    raise ImportError(f"RecurrenceName and the table of recurrences differ: {sorted(RECURRENCES)}")

# Tensors tell which recurrence they are for (kernels/banks.py), so no two rows may have the same facts.
_BY_FORM = {(row.delta_rule, row.channel_decay): row for row in RECURRENCES.values()}
if len(_BY_FORM) < len(RECURRENCES):
    raise ImportError(f"two recurrences have the same delta_rule and channel_decay: {sorted(RECURRENCES)}")


def find_recurrence(delta_rule: bool, channel_decay: bool) -> Recurrence:
    """Return the recurrence with these facts. Raises ValueError where there is none."""
    found = _BY_FORM.get((delta_rule, channel_decay))
    if found is None:
        kind = "delta rule" if delta_rule else "sum of writes"
        raise ValueError(f"no recurrence is a {kind} with one decay per {'channel' if channel_decay else 'head'}")
    return found
