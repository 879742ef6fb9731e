"""Commands that write job files."""

from pathlib import Path
from typing import Annotated, Any

import typer

from madgen.cli.arguments import JobArguments, load_job, split_arguments, writing_to
from madgen.utils.errors import UserError


def config(job: JobArguments) -> None:
    """Print the resolved job as YAML, with the origin of each value.

    The output is itself a job file.

    Examples:

        madgen config jobs/demo.yaml
        madgen config jobs/alps.yaml fast sampling.width=4096
    """
    from madgen.config.loader import load_origins

    loaded = load_job(job)
    files, overrides = split_arguments(job)
    origins = load_origins(files, overrides)
    for line in _yaml_lines(loaded.as_dict(), origins):
        print(line)


def _yaml_lines(content: dict[str, Any], origins: dict[str, str], prefix: str = "", indent: str = "") -> list[str]:
    """Format nested settings as YAML, one line each, with their origins as comments."""
    import yaml

    lines = []
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value and name != "prompts.columns":
            lines += [f"{indent}{key}:", *_yaml_lines(value, origins, f"{name}.", f"{indent}  ")]
            continue
        plain = list(value) if isinstance(value, tuple) else value
        text = yaml.safe_dump({key: plain}, default_flow_style=True, allow_unicode=True, width=float("inf"))
        lines.append(f"{indent}{text.strip()[1:-1]}  # {origins.get(name, 'default')}")
    return lines


def init(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Job file to write (.yaml).")],
) -> None:
    """Write a commented job file, and a prompt file beside it, to start a dataset from.

    Examples:

        madgen init alps.yaml
    """
    from madgen.utils.resources import resource

    prompts = file.with_suffix(".txt")
    if file.suffix not in (".yaml", ".yml"):
        raise UserError(f"FILE must end in .yaml, got {file}")
    for path in (file, prompts):
        if path.exists():
            raise UserError(f"{path} exists already; choose another name")
    if not file.parent.is_dir():
        raise UserError(f"the folder {file.parent} does not exist; create it first")
    source = resource("jobs")
    text = (source / "template.yaml").read_text(encoding="utf-8").replace("prompts/template.txt", prompts.name)
    with writing_to(file):
        prompts.write_text((source / "prompts/template.txt").read_text(encoding="utf-8"), encoding="utf-8")
        file.write_text(text, encoding="utf-8")
    print(f"{file} and {prompts} written; edit them, then run: madgen generate {file}")
