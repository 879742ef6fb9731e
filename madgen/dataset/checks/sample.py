"""Check a sample: its records against its sidecar entry, its JSON against both and against `dataset.json`."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from xml.sax.saxutils import unescape

from PIL import Image, UnidentifiedImageError

from madgen.dataset.checks.tar import TarSample
from madgen.dataset.format import FormatError, Manifest, Portion, SampleEntry, prompt_id
from madgen.dataset.identity import fingerprint
from madgen.dataset.records import parse_object

IMAGE_FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}
SETTINGS = ("backbone", "method", "sampling", "safety")
"""Sections that the JSON of a sample and the identity of a dataset share."""
DEVIATIONS: dict[tuple[str, ...], str] = {("backbone", "dtype"): "float32", ("sampling", "decode"): "tiled"}
"""Settings that fallbacks change for single samples, which their JSON records."""
NO_ERRORS = (OSError, ValueError, SyntaxError, LookupError, TypeError, ArithmeticError, MemoryError)
"""Errors of Pillow for damaged images."""


@dataclass(frozen=True)
class Expected:
    """The values of `dataset.json` that every sample must agree with."""

    fingerprints: frozenset[str]
    image_format: str | None
    embedded: bool
    """Whether images carry the JSON of their sample."""
    manifest: Manifest
    """Of the dataset that generated the samples."""
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Sections of the identity that each fingerprint stands for."""

    @classmethod
    def of(cls, portion: Portion) -> Expected:
        """Read them from a manifest. If its identity does not have its fingerprint, either may be the right one."""
        known, manifest = portion.fingerprints, portion.source
        if fingerprint(manifest.identity) != manifest.fingerprint:
            return cls(known | {fingerprint(manifest.identity)}, None, False, manifest)
        embedded = manifest.value("identity.output.embedded") == 1
        return cls(known, manifest.value("identity.output.format"), embedded, manifest, _settings(manifest))

    def foreign(self, fingerprint: Any) -> str:
        """Describe what has a fingerprint that is not among those expected."""
        return f"of another dataset: fingerprint {fingerprint!r:.40}, expected {' or '.join(sorted(self.fingerprints))}"


def _settings(manifest: Manifest) -> dict[str, dict[str, Any]]:
    own = {name: manifest.identity[name] for name in SETTINGS if name in manifest.identity}
    settings = dict.fromkeys(manifest.sample_fingerprints, own)
    for source in manifest.sources or ():
        settings |= _settings(source)
    return settings


def check_sample(sample: TarSample, entry: SampleEntry, expected: Expected) -> tuple[list[str], dict[str, Any]]:
    """Return the problems of a sample, and its JSON."""
    problems = [*sample.problems, *_check_span(sample, entry)]
    images = [name for name in sample.members if name in IMAGE_FORMATS]
    if len(images) != 1 or list(sample.members) != sorted([*images, "json", "txt"]):
        return [*problems, f"members {sorted(sample.members)}, expected one image, json and txt, in order"], {}
    if expected.image_format not in (None, images[0]):
        problems.append(f"the image is a .{images[0]}, expected .{expected.image_format}")
    try:
        metadata = parse_object(sample.members["json"], "its JSON")
    except FormatError as error:
        return [*problems, str(error)], {}
    problems += _check_json(sample, metadata, entry, expected.manifest.key_prefixes)
    problems += _check_identity(metadata, expected)
    problems += _check_image(sample.members[images[0]], images[0], metadata, entry, expected.embedded)
    return problems, metadata


def _check_span(sample: TarSample, entry: SampleEntry) -> Iterator[str]:
    if (sample.offset, sample.size) != (entry.offset, entry.size):
        yield (
            f"its records are {sample.size} bytes from byte {sample.offset}, "
            f"its sidecar says {entry.size} from {entry.offset}"
        )
    if sample.digest.hexdigest() != entry.sha256:
        yield "its bytes do not have the sidecar's sha256"


def _check_json(
    sample: TarSample, metadata: Mapping[str, Any], entry: SampleEntry, key_prefixes: frozenset[str]
) -> Iterator[str]:
    recorded = {name: getattr(entry, name) for name in ("key", "seed", "prompt", "height", "width")}
    for name, value in recorded.items():
        if not _same(metadata.get(name), value):
            yield f"its JSON says {name} {metadata.get(name)!r:.60}, its sidecar {value!r:.60}"
    for name in ("scores", "columns"):
        if not _same(metadata.get(name), getattr(entry, name)):
            yield f"its {name} are not those of its sidecar"
    number = entry.key.rpartition("-")[2]
    identities = [prompt_id(entry.key).removeprefix(prefix) for prefix in key_prefixes if entry.key.startswith(prefix)]
    if not re.fullmatch(r"[0-9]{4,}", number):
        yield "its key does not end with the number of a sample"
    elif (
        not identities
        or metadata.get("prompt_id", identities[0]) not in identities
        or metadata.get("sample_index", int(number)) != int(number)
    ):
        yield "the prompt_id and sample_index of its JSON do not give its key"
    if sample.members["txt"] != entry.prompt.encode():
        yield "its txt is not the prompt of its sidecar"


def _check_identity(metadata: Mapping[str, Any], expected: Expected) -> Iterator[str]:
    if "fingerprint" in metadata and metadata["fingerprint"] not in expected.fingerprints:
        yield f"it is a sample {expected.foreign(metadata['fingerprint'])}"
        return
    unknown = next(iter(expected.settings.values()), {}) if "fingerprint" not in metadata else {}
    for section, settings in expected.settings.get(metadata.get("fingerprint", ""), unknown).items():
        if section in metadata or "fingerprint" in metadata:
            yield from _conflicts(settings, metadata.get(section), (section,))


def _conflicts(expected: Any, value: Any, path: tuple[str, ...]) -> Iterator[str]:
    """Yield the leaves of `expected` that `value` contradicts; `value` may have more keys."""
    if isinstance(expected, dict) and isinstance(value, dict):
        for name, item in expected.items():
            yield from _conflicts(item, value.get(name), (*path, name))
    elif isinstance(expected, list) and isinstance(value, list) and len(expected) == len(value):
        for index, (item, other) in enumerate(zip(expected, value, strict=True)):
            yield from _conflicts(item, other, (*path, str(index)))
    elif not _same(expected, value) and (value is None or DEVIATIONS.get(path) != value):
        yield f"its JSON says {'.'.join(path)} {value!r:.60}, dataset.json {expected!r:.60}"


def _same(one: Any, other: Any) -> bool:
    """Compare JSON values; true and 1 differ."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def _check_image(
    data: bytes, image_format: str, metadata: Mapping[str, Any], entry: SampleEntry, embedded: bool
) -> Iterator[str]:
    """Decode the image, unless its header already announces another size than the sidecar."""
    try:
        with Image.open(io.BytesIO(data), formats=[IMAGE_FORMATS[image_format]]) as image:
            if (image.height, image.width) != entry.shape:
                yield f"the image is {image.height}x{image.width} px, its sidecar says {entry.height}x{entry.width} px"
                return
            image.load()
            if not _is_whole(data, image_format):
                yield "its image is cut, or more bytes follow it"
            info = {str(name): value for name, value in image.info.items()}
    except UnidentifiedImageError:  # its text is the address of the buffer
        yield f"its image is no {image_format} file"
        return
    except NO_ERRORS as error:
        yield f"its image does not decode: {error}"
        return
    if embedded and not _is_embedded(info, metadata):
        yield "the metadata in its image is not that of its JSON"


def _is_whole(data: bytes, image_format: str) -> bool:
    """Return whether a file ends where its format ends; Pillow forgives a missing end."""
    if image_format == "webp":
        return int.from_bytes(data[4:8], "little") + 8 == len(data)
    return data.endswith(b"\0\0\0\0IEND\xaeB`\x82" if image_format == "png" else b"\xff\xd9")


def _is_embedded(info: Mapping[str, Any], metadata: Mapping[str, Any]) -> bool:
    """Return whether an image carries the JSON of its sample, which may be shortened (`cut`)."""
    text = info.get("parameters")
    if text is None and isinstance(info.get("xmp"), bytes):
        match = re.search(r"""madgen:parameters=(?:"([^"]*)"|'([^']*)')""", info["xmp"].decode("utf-8", "replace"))
        entities = {"&quot;": '"', "&apos;": "'", "&#10;": "\n", "&#13;": "\r", "&#9;": "\t"}
        text = unescape(match[1] if match[1] is not None else match[2], entities) if match else None
    try:
        content = json.loads(text or "")
    except (ValueError, RecursionError):
        return False
    if not isinstance(content, dict):
        return False
    if content.pop("cut", False):
        content = {name: content.get(name) for name in ("key", "seed", "fingerprint") if name in content}
        return all(metadata.get(name) == value for name, value in content.items())
    return content == metadata
