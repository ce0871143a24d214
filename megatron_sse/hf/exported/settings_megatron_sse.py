"""Where each setting of a model stands in config.json: by transformers' name at the top, or in the section `model`."""

from collections.abc import Mapping
from typing import Any

# Settings that transformers has names for, and what they are called in the YAML files of megatron-sse.
SHARED = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "initializer_range": "init_std",
    "tie_word_embeddings": "tie_embeddings",
}
# Follow from the section `model`, and are written nowhere.
DERIVED = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")


def split_settings(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return the model's part of config.json: each setting once. model: the complete settings."""
    section = {key: value for key, value in model.items() if key not in (*SHARED.values(), "num_layers")}
    return {name: model[key] for name, key in SHARED.items()} | {"model": section}


def complete_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the complete settings of a model, given the contents of config.json.

    Earlier exports have some settings twice. Raises ValueError where they differ.
    """
    section = dict(config["model"])
    for name, key in SHARED.items():
        value = config.get(name)
        if value is None:
            value = section.get(key, False if key == "tie_embeddings" else None)
        if section.get(key, value) != value:
            raise ValueError(f"{name}: got {value}, and model.{key} {section[key]}; remove the wrong one")
        section[key] = value
    derived = derived_settings(section)
    for name in DERIVED:
        if config.get(name, derived[name]) not in (None, derived[name]):
            raise ValueError(f"{name}: got {config[name]}, but by the section model it is {derived[name]}; remove it")
    return section | {"num_layers": derived["num_hidden_layers"]}


def derived_settings(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of DERIVED. Sizes of heads are the softmax layers' where there are any."""
    softmax = "softmax" in section["layers"]
    heads = section["softmax" if softmax else "sse"]
    shared = heads["num_kv_heads" if softmax else "num_value_heads"]
    return dict(zip(DERIVED, (len(section["layers"]), heads["num_heads"], shared, heads["head_dim"]), strict=True))
