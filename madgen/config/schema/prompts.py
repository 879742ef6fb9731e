"""`prompts`: where prompts come from."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from madgen.config.schema.checks import check, check_one_of, check_url

PROMPT_FIELDS = ("id", "prompt", "negative_prompt", "width", "height", "seed", "regions", "across")
"""Fields of a row of a prompt file."""
PICTURE_FIELDS = {
    "image": "sampling.init.strength",
    "mask": "sampling.init.strength",
    "place": "sampling.init.strength",
    "control": "backbone.controlnet.weights",
    "style": "backbone.ip_adapter.weights",
}
"""Fields of rows that name pictures, with the setting that makes a job read them. Others ignore or keep them."""


@dataclass(frozen=True, kw_only=True)
class PromptsConfig:
    """The prompts, and how many panoramas are sampled from each."""

    source: str = "prompts.txt"
    """A prompt file: `.txt`, `.jsonl`, `.json`, `.csv`, `.tsv` (each also with `.gz`) or `.parquet`; several files as a
    pattern such as `prompts/**/*.jsonl`, read in the order of their paths; the URL of such a file on any file system
    that fsspec supports (`s3://`, `gs://`, `https://`); a Hugging Face dataset: `hf://owner/name`,
    `hf://owner/name/config`, or `hf:///folder` for a local one; or the samples of a WebDataset, by madgen or others:
    `dataset://folder`, with the pictures to start from. Relative paths are resolved against the current
    directory first, then against the job file."""
    split: str = "train"
    """Split of a Hugging Face dataset."""
    columns: dict[str, str] = field(default_factory=dict)
    """Columns (or JSON keys) of the source to read, by field: `{prompt: caption}` reads the prompt from `caption`.
    Fields are `id`, `prompt`, `negative_prompt`, `width`, `height`, `seed`, `regions` and `across`, in jobs that start
    from pictures `image`, `mask` and `place`, with a ControlNet `control`, and with an IP-Adapter `style`. If empty,
    columns must have these names; unknown columns are errors, see `keep_columns`."""
    keep_columns: Any = None
    """Further columns (or JSON keys) of the source to keep with each sample, in `columns` of its JSON and as columns of
    `index.parquet`: a list of names, or `all`. null: none."""
    comments: str | None = None
    """Ignore lines of a `.txt` that start with this text, such as `#`; null: every line is a prompt."""
    template: str | None = None
    """Text with attributes in braces, such as `a {time} view of {place}`, in place of `source`; `{{` and `}}` are
    braces. A prompt is generated for each combination of `attributes`, or for `samples` random ones."""
    attributes: dict[str, Any] = field(default_factory=dict)
    """Values of the attributes in `template`, by name: a list such as `[dawn, noon]`, or `{values: [dawn, noon],
    weights: [3, 1]}` for random combinations. They are kept with each sample as `keep_columns` are."""
    samples: int | None = None
    """Number of random combinations of `attributes`, > 0, drawn independently by `seed`; equal ones are treated as
    `on_duplicate` requests, or renamed if it is `error`. null: all combinations."""
    negative_prompt: str = ""
    """Negative prompt of rows that have none."""
    samples_per_prompt: int = 1
    """Number of panoramas for each prompt, with different seeds, 1..10000."""
    limit: int | None = None
    """Use only the first `limit` prompts, > 0; null: all."""
    seed: int = 0
    """Base seed, 0..2^64-1. A sample's seed is derived from it, the prompt's id and the sample's index. A row's `seed`
    replaces it, and is itself the seed of the row's first sample."""
    on_duplicate: str = "error"
    """Handling of prompts with equal ids: `error`, `skip` all but the first, or `rename` them."""
    shuffle: bool = False
    """Shuffle the prompts before they are split into shards, by `seed` and their ids. Keys, seeds and pixels do not
    change."""
    regions: list[dict[str, Any]] = field(default_factory=list)
    """Regions of rows that have none, each `{mask, prompt, negative_prompt}`. `mask` is `[left, top, right, bottom]` in
    pixels, or an image file that is white inside the region, resolved as `source` is. `negative_prompt` defaults to
    that of the row. Cannot be combined with `across`."""
    allow_picture_urls: list[str] = field(default_factory=list)
    """URLs, or their beginnings, at which rows may name pictures: `[https://example.com/pictures/, s3://bucket/]`. They
    are downloaded while the job is planned, and cached. Empty: no picture is read from a URL, except beside a prompt
    file at a URL."""
    allow_masks_outside: bool = False
    """Let rows name masks and pictures outside the folder of their prompt file, such as by an absolute path. They are
    published in the dataset, or can be seen in it: set it only for prompt files that you trust."""
    across: list[str] = field(default_factory=list)
    """Further prompts of rows that have none, spaced evenly along the width and blended; the row's own prompt is at the
    left edge."""

    def __post_init__(self) -> None:
        check(
            1 <= self.samples_per_prompt <= 10_000,
            f"prompts.samples_per_prompt must be in 1..10000, got {self.samples_per_prompt}",
        )
        check(0 <= self.seed < 2**64, f"prompts.seed must be in 0..2^64-1, got {self.seed}")
        check(not (self.regions and self.across), "prompts.regions and prompts.across exclude each other; give one")
        check(self.limit is None or self.limit > 0, f"prompts.limit must be > 0 prompts or null, got {self.limit}")
        check(self.split != "", "prompts.split is empty; use for example train")
        for field_name, column in self.columns.items():
            check_one_of("a key of prompts.columns", field_name, (*PROMPT_FIELDS, *PICTURE_FIELDS))
            check(column != "", f"prompts.columns.{field_name} is empty; set it to a column of prompts.source")
        check(
            not self.columns or "prompt" in self.columns,
            "prompts.columns has no key prompt; set prompts.columns.prompt to the column that contains the prompt",
        )
        check(
            len(set(self.columns.values())) == len(self.columns),
            f"prompts.columns names a column twice: {', '.join(self.columns.values())}",
        )
        check_one_of("prompts.on_duplicate", self.on_duplicate, ("error", "skip", "rename"))
        self._check_keep_columns()
        self._check_template()
        for url in self.allow_picture_urls:
            check(
                re.match(r"[a-z][a-z0-9+.-]*://", url) is not None,
                f"prompts.allow_picture_urls must be beginnings of URLs, such as https://example.com/, got {url!r}",
            )
        if "://" in self.source and not self.source.startswith(("hf://", "dataset://")):
            check_url("prompts.source", self.source)

    def _check_keep_columns(self) -> None:
        keep = self.keep_columns
        names = keep if isinstance(keep, list | tuple) else []
        check(
            keep in (None, "all") or (names != [] and all(isinstance(name, str) and name for name in names)),
            f"prompts.keep_columns must be all, a list of column names such as [category], or null, got {keep!r}",
        )
        check(len(set(names)) == len(names), f"prompts.keep_columns names a column twice: {', '.join(names)}")
        check(self.comments != "", "prompts.comments is empty; set it to the start of comments, such as '#', or null")

    def _check_template(self) -> None:
        if self.template is None:
            unused = next((name for name in ("attributes", "samples") if getattr(self, name)), None)
            check(unused is None, f"prompts.{unused} has no effect without prompts.template; set it, or remove it")
            check(self.samples is None, "prompts.samples has no effect without prompts.template; set it to null")
            return
        check(self.samples is None or self.samples > 0, f"prompts.samples must be > 0 or null, got {self.samples}")
        check(
            self.source == PromptsConfig.__dataclass_fields__["source"].default,
            f"prompts.template and prompts.source={self.source} exclude each other; remove one of them",
        )
        for name, default in (("columns", {}), ("keep_columns", None), ("comments", None), ("split", "train")):
            check(
                getattr(self, name) == default,
                f"prompts.{name} has no effect with prompts.template, which reads no source; remove it",
            )
