"""Checks that the dataclasses of the schema share."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from madgen.utils.credentials import check_no_credentials, secret_variables
from madgen.utils.errors import UserError
from madgen.utils.validation import check_path

PATHS = set(
    "output.dir prompts.source prompts.regions.mask backbone.pretrained backbone.config backbone.loras.weights "
    "backbone.controlnet.weights backbone.ip_adapter.weights safety.checker scores.clip".split()
)
"""Keys whose values may be paths."""


def check(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def check_one_of(name: str, value: Any, known: Sequence[str]) -> None:
    check(value in known, f"{name} must be one of {', '.join(known)}, got {value!r}")


def as_yaml(value: Any) -> str:
    """Format a value as in a job file."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(as_yaml, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def quoted(value: Any) -> str:
    """Format a value for an error: strings with quotes, None as in a job file."""
    return "null" if value is None else repr(value)


def changed(config: Any) -> dict[str, Any]:
    """Return the fields of a config that differ from their defaults."""
    return {each.name: value for each in fields(config) if (value := getattr(config, each.name)) != each.default}


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield all strings in nested mappings and lists, with their keys."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _strings(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item, key)


def check_recordable(settings: Any) -> None:
    """Raise UserError if a string cannot be recorded in the dataset, or must not be (credentials), or is no path."""
    secrets = secret_variables()
    for key, text in _strings(settings):
        check_no_credentials(key, text, secrets)
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(f"{key} must be valid Unicode, got {text!r}") from None
        check("\0" not in text, f"{key} contains a NUL character: {text!r}; remove it")
        if key in PATHS:
            check_path(key, text)


def check_url(name: str, url: str) -> None:
    """Raise UserError if `url` is not the URL of a folder, or may contain credentials (which are not printed then)."""
    protocol, separator, rest = url.partition("://")
    check(
        ":" not in (rest if separator else url).rpartition("@")[0] and "?" not in url and "#" not in url,
        f"{name} must not contain a password, key or query, since it is recorded; set credentials in the environment",
    )
    check(
        re.fullmatch(r"[a-z][a-z0-9+.-]*", protocol) is not None and rest.strip("/") != "" and url.isprintable(),
        f"{name} must be a URL such as s3://bucket/folder or file:///a/folder, got {url!r}",
    )
