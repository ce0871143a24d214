"""The arguments of `megatron-sse train`."""

from dataclasses import dataclass

from megatron_sse.config.request import ConfigRequest


@dataclass(frozen=True, kw_only=True)
class Request(ConfigRequest):
    """Train the model of a YAML file in this process, which is one of the run's. `./run.sh CONFIG` starts them all."""

    command, help = "train", "train a model"
