"""The arguments of `megatron-sse train`."""

from dataclasses import dataclass

from megatron_sse.config.request import ConfigRequest


@dataclass(frozen=True, kw_only=True)
class Request(ConfigRequest):
    """Train the model of a YAML file, or resume training it. The command starts the run's processes on this machine;
    under torchrun it is one of them. docs/train.md explains it, docs/multi_node.md runs on several machines."""

    command, help = "train", "train a model"
