"""Hooks of MkDocs: the configuration and command line references, and the pages of benchmark results.

The references are generated while the site is built, from the docstrings of `madgen/config/schema/` and from the
commands themselves, so that they cannot go stale.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from madgen.cli.app import app
from madgen.config import schema
from madgen.config.documentation import field_docstrings

ROOT = Path(__file__).resolve().parents[2]
RESULTS = "benchmarks-results"
log = logging.getLogger("mkdocs.hooks")  # warnings are errors in strict mode


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the reports and figures in `benchmarks/results`, which lie outside the documentation's folder."""
    for path in sorted((ROOT / "benchmarks/results").iterdir()):
        if path.suffix in (".md", ".png"):
            files.append(File.generated(config, f"{RESULTS}/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Insert the generated references, and point links to benchmark results at their pages."""
    markdown = markdown.replace("](../benchmarks/results/", f"]({RESULTS}/")
    if page.file.src_uri == "configuration.md":
        return f"{markdown}\n{configuration(schema.Job())}"
    if page.file.src_uri == "cli.md":
        return f"{markdown}\n{commands()}"
    return markdown


def configuration(job: schema.Job) -> str:
    """Return the reference of a job's keys: a section for each group, a heading for each key."""
    return "\n\n".join(["## Top level", *_keys(job, "")])


def _keys(group: Any, prefix: str) -> Iterator[str]:
    documented = field_docstrings(type(group))
    for field in dataclasses.fields(group):
        value, key = getattr(group, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            continue
        description = documented.get(field.name, "")
        if not description:
            log.warning("the configuration key %s has no docstring", key)
        yield f"#### `{key}` {{ #{key} }}\n\n`{field.type}`, default `{_yaml(value)}`  \n{description}"
        if field.type == "list[LoraConfig]":
            yield from _items(schema.LoraConfig)
    for field in dataclasses.fields(group):
        value, key = getattr(group, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            yield f"{'###' if prefix else '##'} `{key}` {{ #{key} }}"
            if _is_described(type(value)):
                yield inspect.getdoc(type(value)) or ""
            yield from _keys(value, f"{key}.")


def _items(cls: type) -> Iterator[str]:
    """Yield a list of the keys that an item of a list has."""
    documented = field_docstrings(cls)
    lines = []
    for field in dataclasses.fields(cls):
        required = field.default is dataclasses.MISSING
        default = "required" if required else f"default `{_yaml(field.default)}`"
        lines.append(f"- `{field.name}`: `{field.type}`, {default}. {documented.get(field.name, '')}".rstrip())
    yield "Each item has\n\n" + "\n".join(lines)


def _is_described(cls: type) -> bool:
    """Whether the class has a docstring of its own, not the signature that `dataclass` puts in its place."""
    return not (cls.__doc__ or "").startswith(f"{cls.__name__}(")


def _yaml(value: Any) -> str:
    """Return a default as a job file would have it."""
    text = yaml.safe_dump(list(value) if isinstance(value, tuple) else value, default_flow_style=True)
    return text.removesuffix("\n").removesuffix("\n...")


def commands() -> str:
    """Return the reference of all commands, from their help."""
    root = typer.main.get_command(app)
    with typer.Context(root, info_name="madgen") as context:
        names = root.list_commands(context)
        return "\n\n".join(_command(root.get_command(context, name), name, context) for name in names)


def _command(command: Any, name: str, parent: Any) -> str:
    with type(parent)(command, info_name=name, parent=parent) as context:
        usage = " ".join(command.collect_usage_pieces(context))
        records = [parameter.get_help_record(context) for parameter in command.get_params(context)]
    rows = [_row(*record) for record in records if record is not None and "--help" not in record[0]]
    title = f"## `madgen {name}` {{ #{name} }}\n\n```text\nmadgen {name} {usage}\n```"
    table = "\n".join(['<div class="options" markdown>', "", "| option | meaning |", "|---|---|", *rows, "", "</div>"])
    return "\n\n".join([title, inspect.cleandoc(command.help), table])


def _row(name: str, text: str) -> str:
    """Return a parameter's row of the table; its default, in brackets at the end of its help, is set as code."""
    text = re.sub(r"\[default: ([^(;\]][^;\]]*)", r"[default: `\1`", " ".join(text.split()))
    name = re.sub(r" <(list\[)?(str|Path)\]?>$", "", name)
    return f"| `{name}` | {text.replace('|', chr(92) + '|')} |"
