"""The arms of the study of recall: settings on top of configs/recall_mqar.yaml, and the claims each one tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_sse.config import load_config
from megatron_sse.tools.studies.sizes import TOLERANCE, match_parameters, num_parameters, state_elements

BASE = "n8k1"
PURE6 = "sse6"

CLAIMS = {
    "a": "recall rises with the number of partitions at equal parameters",
    "b": "softmax key map against SiLU",
    "c": "weights on write and read, one of them, neither",
    "d": "with and without the shared bank",
    "e": "SSE-GDN: the router's weights on values, on write strengths, or cancelled (the authors' code)",
    "f": "hybrids 5:1 against pure SSE and softmax only",
    "g": "with and without balance loss",
    "h": "what may make routing learn: own reads, weights of 1 at the start, all read, a learning rate that falls late",
}


@dataclass(frozen=True)
class Arm:
    """A model of the study, or another way to train one.

    claims: keys of CLAIMS. overrides: settings on top of the file's. parameters_as: arm whose number of parameters this
    one gets, through the width of its MLP. state_as: arm whose number of state elements this one must have.
    """

    claims: str
    overrides: tuple[str, ...]
    parameters_as: str | None = BASE
    state_as: str | None = None


def _sse(*settings: str) -> tuple[str, ...]:
    return tuple(f"model.sse.{setting}" for setting in settings)


_SIX = ("model.num_layers=6",)
# model.sse is empty because softmax models would ignore its settings.
_SOFTMAX = ("model.layers=softmax", "model.sse={}", "model.softmax.num_heads=2")
_HYBRID = ("model.layers=5*sse, softmax", "model.softmax.num_heads=2")
_WSD = "optimizer.schedule=wsd"

ARMS = {
    "n1k1": Arm("a", _sse("num_partitions=1")),
    "n2k1": Arm("a", _sse("num_partitions=2")),
    "n4k1": Arm("a", _sse("num_partitions=4")),
    BASE: Arm("abcdegh", _sse("num_partitions=8"), None),
    "n16k1": Arm("a", _sse("num_partitions=16")),
    # SSE layers without partitions are gated linear attention.
    "gla": Arm("a", _sse("num_partitions=0")),
    "gla_large_heads": Arm("a", _sse("num_partitions=0", "head_dim=24"), state_as=BASE),
    "gla_value_heads": Arm("a", _sse("num_partitions=0", "num_value_heads=18"), state_as=BASE),
    "softmax": Arm("a", _SOFTMAX),
    "silu": Arm("b", _sse("num_partitions=8", "key_map=silu"), state_as=BASE),
    "gla_silu": Arm("b", _sse("num_partitions=0", "key_map=silu"), state_as="gla"),
    "write_only": Arm("c", _sse("num_partitions=8", "weight_reads=false"), state_as=BASE),
    "read_only": Arm("c", _sse("num_partitions=8", "weight_writes=false"), state_as=BASE),
    "no_weights": Arm("c", _sse("num_partitions=8", "weight_writes=false", "weight_reads=false"), state_as=BASE),
    "no_shared": Arm("d", _sse("num_partitions=8", "shared_bank=false")),
    "gdn_post_norm": Arm("e", _sse("recurrence=gdn", "gate=post_norm"), state_as=BASE),
    "gdn_beta": Arm("e", _sse("recurrence=gdn", "gate=beta"), state_as=BASE),
    "gdn_reference": Arm("e", _sse("recurrence=gdn", "gate=reference"), state_as=BASE),
    "gdn": Arm("e", _sse("recurrence=gdn", "num_partitions=0")),
    # In heads of 8 the delta rule does not learn the task at all.
    "gdn16_post_norm": Arm("e", _sse("recurrence=gdn", "gate=post_norm", "head_dim=16")),
    "gdn16_beta": Arm("e", _sse("recurrence=gdn", "gate=beta", "head_dim=16")),
    "gdn16_reference": Arm("e", _sse("recurrence=gdn", "gate=reference", "head_dim=16")),
    "gdn16": Arm("e", _sse("recurrence=gdn", "num_partitions=0", "head_dim=16")),
    PURE6: Arm("f", _SIX, None),
    "hybrid6": Arm("f", (*_SIX, *_HYBRID), PURE6),
    "softmax6": Arm("f", (*_SIX, *_SOFTMAX), PURE6),
    "n2k1_own_reads": Arm("ah", _sse("num_partitions=2", "own_read_router=true")),
    "n4k1_own_reads": Arm("ah", _sse("num_partitions=4", "own_read_router=true")),
    "own_reads": Arm("ah", _sse("num_partitions=8", "own_read_router=true"), state_as=BASE),
    "n16k1_own_reads": Arm("ah", _sse("num_partitions=16", "own_read_router=true")),
    "scaled": Arm("h", _sse("num_partitions=8", "weight_scale=8.0"), state_as=BASE),
    "own_reads_scaled": Arm("h", _sse("num_partitions=8", "own_read_router=true", "weight_scale=8.0"), state_as=BASE),
    "read_all": Arm("h", _sse("num_partitions=8", "num_readers=8"), state_as=BASE),
    # The learning rate falls only in the last fifth, which gives a plateau more time to end.
    "gla_wsd": Arm("h", (*_sse("num_partitions=0"), _WSD)),
    "wsd": Arm("h", (*_sse("num_partitions=8"), _WSD), state_as=BASE),
    "n16k1_wsd": Arm("h", (*_sse("num_partitions=16"), _WSD)),
    "n16k1_own_reads_wsd": Arm("h", (*_sse("num_partitions=16", "own_read_router=true"), _WSD)),
    "gdn16_post_norm_wsd": Arm("eh", (*_sse("recurrence=gdn", "gate=post_norm", "head_dim=16"), _WSD)),
    "gdn16_beta_wsd": Arm("eh", (*_sse("recurrence=gdn", "gate=beta", "head_dim=16"), _WSD)),
    "gdn16_reference_wsd": Arm("eh", (*_sse("recurrence=gdn", "gate=reference", "head_dim=16"), _WSD)),
    "gdn16_wsd": Arm("eh", (*_sse("recurrence=gdn", "num_partitions=0", "head_dim=16"), _WSD)),
    "sse6_wsd": Arm("fh", (*_SIX, _WSD), PURE6),
    "hybrid6_wsd": Arm("fh", (*_SIX, *_HYBRID, _WSD), PURE6),
    "no_balance": Arm("g", _sse("num_partitions=8", "balance_loss=0.0"), state_as=BASE),
}


def arm_settings(name: str, path: Path, settings: list[str]) -> list[str]:
    """Return the settings of an arm: those for all arms, its own, and the width of the MLP that matches parameters."""
    arm, given = ARMS[name], [*settings, *ARMS[name].overrides]
    if arm.parameters_as is None:
        return given
    wanted = num_parameters(load_config(path, [*settings, *ARMS[arm.parameters_as].overrides]).model)
    return match_parameters(path, given, wanted)


def tabulate_arms(names: list[str], path: Path, settings: list[str]) -> str:
    """Return a markdown table of claims, parameters and state of arms, and where these fail to match other arms."""
    lines = ["| arm | claims | parameters | as | state | as |", "|---|---|---|---|---|---|"]

    def sizes(name: str) -> tuple[int, int]:
        config = load_config(path, arm_settings(name, path, settings))
        return num_parameters(config.model), state_elements(config)

    for name in names:
        arm, (parameters, state) = ARMS[name], sizes(name)
        as_parameters, as_state = arm.parameters_as or "-", arm.state_as or "-"
        if arm.parameters_as and abs(parameters / (other := sizes(arm.parameters_as)[0]) - 1) > TOLERANCE:
            as_parameters = f"not equal: {arm.parameters_as} has {other:,}"
        if arm.state_as and state != (other := sizes(arm.state_as)[1]):
            as_state = f"not equal: {arm.state_as} has {other:,}"
        lines.append(
            f"| {name} | {', '.join(arm.claims)} | {parameters:,} | {as_parameters} | {state:,} | {as_state} |"
        )
    return "\n".join(lines)
