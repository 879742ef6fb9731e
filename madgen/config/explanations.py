"""Explain what is wrong with a job file: the key, the value, what is expected and the nearest known name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from madgen.config.documentation import summary
from madgen.config.schema import Job, LoraConfig
from madgen.config.schema.checks import as_yaml
from madgen.utils.errors import UserError
from madgen.utils.resources import resource
from madgen.utils.validation import nearest


def paired(value: Any, other: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield the leaves of nested mappings and lists with their keys, and what is there in `other`, or None."""
    if isinstance(value, dict) and isinstance(other, dict):
        for key, item in value.items():
            yield from paired(item, other.get(key), f"{name}.{key}" if name else key)
    elif isinstance(value, list) and isinstance(other, list | tuple):
        for item, its_other in zip(value, other, strict=False):
            yield from paired(item, its_other, name)
    else:
        yield name, value, other


def check_shapes(content: Any, defaults: Any) -> None:
    """Refuse sections, lists and mappings in place of each other or of values; OmegaConf's errors name no key."""
    for name, value, default in paired(content, defaults):
        if isinstance(value, str) and value.startswith("${"):
            continue  # another key of the job
        if isinstance(default, dict):
            example = next((key for key in known_keys(Job()) if key.startswith(f"{name}.")), None)
            if isinstance(value, list) or example is None:
                got = "a list" if isinstance(value, list) else as_yaml(value)
                raise UserError(f"{name} is a mapping: write {name}={{key: value}}, got {got}")
            empty = " or remove it," if value is None else ""
            got = "" if isinstance(value, str) else f" got {as_yaml(value)}"
            raise UserError(f"{name} is a section: set its keys, such as {example}{',' * bool(got)}{empty}{got}"
                            f"{_preset_hint(name)}")  # fmt: skip
        if isinstance(default, list | tuple):
            got = "a mapping" if isinstance(value, dict) else as_yaml(value)
            one_name = name == "method.mad.blocks" and isinstance(value, str) and value.isidentifier()
            blocks = f"[{value if one_name else 'all'}]"
            example = f", such as method.mad.blocks={blocks}" if name == "method.mad.blocks" else ""
            raise UserError(f"{name} is a list: write {name}=[...]{example}, got {got}")


def explain(error: Exception) -> str:
    """Return the message for an error of OmegaConf."""
    text = str(error).strip().splitlines()[0]
    key = getattr(error, "full_key", None)
    if "LoraConfig" in text and "missing mandatory" in text:
        return f"{key} is missing; an item of backbone.loras is a mapping, {_LORA}"
    if " is not a subclass of LoraConfig" in text:
        return f"an item of backbone.loras is a mapping, {_LORA}, got {text.partition('value: ')[2]}"
    if str(key).isdigit() and text.startswith("Cannot assign"):
        return "an item of prompts.regions is a mapping, such as {mask: [0, 0, 64, 64], prompt: a hut}"
    if "is not a ListConfig" in text or "is not a TupleConfig" in text:
        return f"{key} is a list: write {key}=[...]"
    for internal, kind in (("ListConfig", "list"), ("DictConfig", "mapping")):
        if internal in text:
            value = re.search(r"(?:Value|string:) '(.*?)'(?: of type| is not|$)", text)
            return f"{key} is one value, not a {kind}" + (f", got {value[1]}" if value else "")
    if key and "not in 'LoraConfig'" in text:
        known = [item.name for item in fields(LoraConfig)]
        return f"unknown key {key!r} of an item of backbone.loras{nearest(str(key), known)}"
    if key and "not in" in text:
        return f"unknown key {key!r}{_nearest(str(key), known_keys(Job()))}"
    return _explain_type(str(key), text) or (f"{key}: {text}" if key else text)


_LORA = "such as {weights: a.safetensors, scale: 1}"
_TYPES = {"Float": "a number", "Integer": "a whole number", "bool": "true or false"}


def _explain_type(key: str, text: str) -> str | None:
    """Return the message for a value of the wrong type; None for other errors."""
    if "Incompatible value 'None'" in text or "is not Optional" in text:
        return f"{key} must have a value, got null; remove it to use the default"
    match = re.fullmatch(r"Value '(.*)' (?:of type '.*' could not be converted to|is not a valid) (\w+).*", text)
    if match is None or match[2] not in _TYPES:
        return None
    value, kind = match[1], _TYPES[match[2]]
    about = summary(Job(), key)
    number = re.fullmatch(r"([0-9.]+) ?[A-Za-z%]+", value) if kind != "true or false" else None
    fix = f"; write {number[1]} without a unit" if number else ""
    name = key if "." in key or about else f"{key} of an item of backbone.loras"
    return f"{name} must be {kind}, got {value!r}{fix}" + (f" ({about})" if about else "")


SIZE = "sampling.height and sampling.width"
OTHER_NAMES = {
    **dict.fromkeys(("size", "resolution", "image_size"), SIZE),
    **dict.fromkeys(("steps", "num_steps"), "sampling.num_inference_steps"),
    **dict.fromkeys(("cfg", "cfg_scale", "scale"), "sampling.guidance_scale"),
    **dict.fromkeys(("num_images_per_prompt", "num_samples"), "prompts.samples_per_prompt"),
    **dict.fromkeys(("model", "checkpoint", "pretrained_model_name_or_path"), "backbone.pretrained"),
    **dict.fromkeys(("torch_dtype", "precision"), "backbone.dtype"),
    **dict.fromkeys(("output_dir", "out", "out_dir"), "output.dir"),
    **dict.fromkeys(("gpus", "num_gpus"), "trainer.devices"),
    "tau": "method.mad.steps",
}
"""Keys by the names that other programs have for them."""


SIMILAR = 0.6
"""Smallest similarity, 0..1, of a key that is proposed from the section of an unknown one."""


def _preset_hint(section: str) -> str:
    names = sorted(file.stem for file in (resource("configs") / section).glob("*.yaml"))
    return f"; to use a preset ({', '.join(names)}), pass its name after the job file" if names else ""


def _nearest(key: str, known: Sequence[str]) -> str:
    """Return the end of an error about an unknown key: a key of its section, of another section, or a similar one."""
    section, _, name = key.rpartition(".")
    if name in OTHER_NAMES:
        return f"; set {OTHER_NAMES[name]}"
    siblings = [other.rpartition(".")[2] for other in known if other.rpartition(".")[0] == section]
    leaves = {other.rpartition(".")[2]: other for other in sorted(known, key=lambda other: -other.count("."))}
    if section and (close := difflib.get_close_matches(name, siblings, n=1, cutoff=SIMILAR)):
        return f"; did you mean '{section}.{close[0]}'?"
    if name in leaves:
        return f"; did you mean {leaves[name]!r}?"
    if section and siblings:
        return f"; {section} has {', '.join(siblings)}"
    hint = nearest(key, known)
    if "did you mean" in hint:
        return hint
    leaf = difflib.get_close_matches(name, list(leaves), n=1)
    return f"; did you mean {leaves[leaf[0]]!r}?" if leaf else f"; known: {', '.join(k for k in known if '.' not in k)}"


def known_keys(config: Any, prefix: str = "") -> list[str]:
    """Return the keys of a config, sections before their keys."""
    keys = []
    for item in fields(config):
        keys.append(prefix + item.name)
        value = getattr(config, item.name)
        if is_dataclass(value):
            keys.extend(known_keys(value, f"{prefix}{item.name}."))
    return keys
