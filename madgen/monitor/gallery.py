"""Two looks at a dataset, finished or still growing: a self-contained `preview.html`, and a contact sheet as a PNG."""

from __future__ import annotations

import base64
import html
import io
import json
import os
import re
import shlex
import tarfile
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import IO, Any

from PIL import Image, ImageDraw, ImageFont

from madgen.dataset.layout import DatasetDir
from madgen.errors import UserError

MIME_TYPES = {"png": "image/png", "jpg": "image/jpeg", "webp": "image/webp"}
"""Member suffix of a picture to its media type."""
TEMPLATE = Path(__file__).with_name("gallery.html")
DATA_MARK = "<!--DATA-->"

THUMBNAIL = (4096, 128)
"""Width and height in pixels that a thumbnail never exceeds; it keeps its aspect ratio and is never enlarged."""
THUMBNAIL_QUALITY = 80
FULL_BYTES = 64_000_000
"""Bytes of original pictures that one page embeds; what does not fit is there as its thumbnail alone."""

SHEET_PICTURE = (768, 256)
"""Width and height in pixels that a picture on the contact sheet never exceeds."""
SHEET_CELL = 192
"""Least width in pixels of a cell on the sheet, which leaves small pictures room for their prompt."""
SHEET_ROWS = 8
SHEET_MOST = 240
SHEET_GAP = 16
SHEET_CAPTION = 24
SHEET_FONT = 14
SHEET_PAPER, SHEET_INK = (250, 250, 248), (40, 40, 44)


@dataclass(frozen=True)
class _Place:
    """Where a sample lies: `size` bytes of tar records from byte `offset` of the tar file `shard`."""

    shard: Path
    key: str
    offset: int
    size: int


@dataclass(frozen=True)
class _Sample:
    """One sample as read: its JSON, and the bytes and the suffix of its picture."""

    place: _Place
    metadata: dict[str, Any]
    picture: bytes
    suffix: str

    @property
    def prompt(self) -> str:
        return str(self.metadata.get("prompt", ""))


def write_gallery(directory: Path, output: Path | None = None, limit: int | None = None) -> Path:
    """Writes one self-contained page with every finished sample of the dataset, and returns its path.

    directory: holds `dataset.json` and `shards/`; a shard without its sidecar is still being written and is left out
    output: the page, replaced at once and never seen half written; default `directory/preview.html`
    limit: at most so many samples, evenly spaced over the dataset; None is all of them

    The page embeds a JPEG thumbnail of each picture, and the original bytes as well for the first `FULL_BYTES` of them.
    Raises UserError: no dataset in `directory`, no finished sample yet, a damaged shard, or a limit below 1.
    """
    directory = Path(directory)
    dataset = _dataset(directory)
    places = _places(directory)
    shown = _spread(places, limit)
    head, tail = _page(directory, dataset, done=len(places), shown=len(shown))

    def write(file: IO[bytes]) -> None:
        file.write(head.encode("utf-8", "replace"))
        _write_data(file, directory, shown)
        file.write(tail.encode("utf-8", "replace"))

    return _replace(directory / "preview.html" if output is None else Path(output), write)


def write_contact_sheet(directory: Path, output: Path | None = None, limit: int = 24) -> Path:
    """Writes a PNG of panoramas under each other in columns, each with its prompt under it, and returns its path.

    directory: as in `write_gallery`
    output: the picture, replaced at once; default `directory/preview.png`
    limit: at most so many samples, evenly spaced over the dataset; 1 to `SHEET_MOST`

    Raises UserError: no dataset in `directory`, no finished sample yet, a damaged shard, or a limit out of range.
    """
    directory = Path(directory)
    if limit > SHEET_MOST:
        raise UserError(f"a contact sheet holds at most {SHEET_MOST} panoramas, not limit={limit}; write the gallery")
    _dataset(directory)
    cells = [(_shrunk(sample, SHEET_PICTURE), sample.prompt) for sample in _read(_spread(_places(directory), limit))]
    sheet = _sheet(cells)
    output = directory / "preview.png" if output is None else Path(output)
    return _replace(output, lambda file: sheet.save(file, format="PNG"))


def _dataset(directory: Path) -> dict[str, Any]:
    """`dataset.json` of a dataset."""
    return DatasetDir(directory).read_manifest()


def _object(data: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError as error:
        raise UserError(f"{where} is not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{where} is not a JSON object")
    return value


def _places(directory: Path) -> list[_Place]:
    """Every sample of the finished shards, in the order of the shards' names."""
    dataset = DatasetDir(directory)
    places = [place for name in sorted(dataset.done()) for place in _listed(dataset, name)]
    if not places:
        raise UserError(f"{directory} has no finished sample yet; the first shard is still to be completed")
    return places


def _listed(dataset: DatasetDir, name: str) -> Iterator[_Place]:
    try:
        for sample in dataset.read_sidecar(name)["samples"]:
            yield _Place(dataset.tar(name), str(sample["key"]), int(sample["offset"]), int(sample["size"]))
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{dataset.sidecar(name)} is no list of samples, each with its key, offset and size") from None


def _spread(places: list[_Place], limit: int | None) -> list[_Place]:
    """At most `limit` places, evenly spaced, the first and the last among them."""
    if limit is not None and limit < 1:
        raise UserError(f"limit={limit} shows nothing; it must be at least 1")
    if limit is None or limit >= len(places):
        return places
    return [places[index * (len(places) - 1) // max(limit - 1, 1)] for index in range(limit)]


def _read(places: Sequence[_Place]) -> Iterator[_Sample]:
    """The samples, one in memory at a time, each shard opened once. UserError names a shard that is damaged."""
    for shard, group in groupby(places, key=lambda place: place.shard):
        try:
            with shard.open("rb") as file:
                for place in group:
                    file.seek(place.offset)
                    yield _sample(place, file.read(place.size))
        except OSError as error:
            raise UserError(f"{shard} cannot be read: {error.strerror or error}") from None


def _sample(place: _Place, records: bytes) -> _Sample:
    """The sample whose tar records these are, its members in any order."""
    members: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(records), mode="r:") as tar:
            for member in tar:
                content = tar.extractfile(member)
                if content is not None and member.name.startswith(f"{place.key}."):
                    members[member.name[len(place.key) + 1 :]] = content.read()
    except tarfile.TarError as error:
        raise UserError(f"{place.shard} is damaged at sample {place.key} (byte {place.offset}): {error}") from None
    suffix = next((suffix for suffix in MIME_TYPES if suffix in members), None)
    if suffix is None or "json" not in members:
        raise UserError(f"{place.shard} is damaged: no picture with its JSON for {place.key} at byte {place.offset}")
    metadata = _object(members["json"], f"{place.key}.json in {place.shard}")
    return _Sample(place, metadata, members[suffix], suffix)


def _shrunk(sample: _Sample, box: tuple[int, int]) -> Image.Image:
    """The picture as RGB, made to fit a box of (width, height) pixels; a smaller one stays as it is."""
    try:
        with Image.open(io.BytesIO(sample.picture)) as image:
            image.thumbnail(box, Image.Resampling.LANCZOS)
            return image.convert("RGB")
    except (OSError, Image.DecompressionBombError) as error:
        raise UserError(f"the picture of {sample.place.key} in {sample.place.shard} is unreadable: {error}") from None


def _replace(output: Path, write: Callable[[IO[bytes]], Any]) -> Path:
    """Lets `write` fill a temporary file beside `output`, which then takes its place."""
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)
    return output


# The page


def _page(directory: Path, dataset: dict[str, Any], *, done: int, shown: int) -> tuple[str, str]:
    """What stands before and after the data of the page."""
    job, plan = dataset.get("job"), dataset.get("plan")
    name = job.get("name") if isinstance(job, dict) else None
    planned = plan.get("samples") if isinstance(plan, dict) else None
    values = {
        "name": str(name or directory.resolve().name),
        "done": f"{done:,} of {planned:,} panoramas done" if isinstance(planned, int) else f"{done:,} panoramas done",
        "shown": f"{shown:,} of them shown, evenly spaced" if shown < done else "",
        "value": str(done),
        "max": str(max(planned, 1) if isinstance(planned, int) else done),
    }
    page = TEMPLATE.read_text(encoding="utf-8")
    head, tail = page.split(DATA_MARK)
    return _filled(head, values), _filled(tail, values)


def _filled(template: str, values: dict[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda match: html.escape(values[match[1]]), template)


def _write_data(file: IO[bytes], directory: Path, places: Sequence[_Place]) -> None:
    """One data block per sample (`s0`, `s1`, ..), one per embedded original (`f0`, ..), and the index of them all."""
    index = []
    embedded = 0
    for number, sample in enumerate(_read(places)):
        thumbnail, width, height = _thumbnail(sample)
        full = embedded + len(sample.picture) <= FULL_BYTES
        file.write(_block(f"s{number}", {"thumbnail": thumbnail, **_details(directory, sample)}))
        if full:
            embedded += len(sample.picture)
            file.write(_block(f"f{number}", _data_uri(MIME_TYPES[sample.suffix], sample.picture)))
        index.append({"key": sample.place.key, "prompt": sample.prompt, "width": width, "height": height, "full": full})
    file.write(_block("index", index))


def _block(name: str, value: Any) -> bytes:
    """A JSON data block: ASCII, and without any character that HTML could take for markup."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return f'<script type="application/json" id="{name}">{text}</script>\n'.encode("ascii")


def _details(directory: Path, sample: _Sample) -> dict[str, Any]:
    key = sample.place.key
    return {
        "rows": list(_rows(sample.metadata)),
        "shard": f"shards/{sample.place.shard.name}",
        "member": f"{key}.{sample.suffix}",
        "command": shlex.join(["madgen", "regenerate", str(directory), key, "-o", f"{key}.png"]),
    }


def _rows(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """All leaves of the metadata as (dotted name, text): as text here, since a browser rounds integers over 2**53."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _rows(item, f"{name}.{key}" if name else str(key))
    else:
        yield name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _thumbnail(sample: _Sample) -> tuple[str, int, int]:
    """The thumbnail as a data URI, then width and height in pixels of the original."""
    image = _shrunk(sample, THUMBNAIL)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=THUMBNAIL_QUALITY, optimize=True)
    with Image.open(io.BytesIO(sample.picture)) as original:
        width, height = original.size
    return _data_uri("image/jpeg", buffer.getvalue()), width, height


def _data_uri(mime: str, data: bytes) -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode('ascii')}"


# The contact sheet


def _columns(cells: Sequence[tuple[Image.Image, str]]) -> int:
    """Columns of a sheet: for wide pictures one per `SHEET_ROWS` of them, for others as many as there are rows."""
    wide = sum(image.width >= 2 * image.height for image, _ in cells) * 2 >= len(cells)
    square = next(side for side in range(1, len(cells) + 1) if side * side >= len(cells))
    least = -(-len(cells) // SHEET_ROWS)
    return least if wide else max(least, square)


def _sheet(cells: Sequence[tuple[Image.Image, str]]) -> Image.Image:
    """The (picture, prompt) pairs column by column, each picture at the left of its cell, its prompt under it."""
    columns = _columns(cells)
    rows = -(-len(cells) // columns)
    cell_width = max(SHEET_CELL, *(image.width for image, _ in cells))
    picture_height = max(image.height for image, _ in cells)
    step_x, step_y = cell_width + SHEET_GAP, picture_height + SHEET_CAPTION + SHEET_GAP
    sheet = Image.new("RGB", (columns * step_x + SHEET_GAP, rows * step_y + SHEET_GAP), SHEET_PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=SHEET_FONT)
    for number, (image, prompt) in enumerate(cells):
        x, y = SHEET_GAP + number // rows * step_x, SHEET_GAP + number % rows * step_y
        sheet.paste(image, (x, y + picture_height - image.height))
        caption = _truncated(prompt, cell_width, font.getlength)
        draw.text((x, y + picture_height + SHEET_CAPTION // 2), caption, SHEET_INK, font, anchor="lm")
    return sheet


def _truncated(prompt: str, width: int, measure: Callable[[str], float]) -> str:
    """The prompt on one line of at most `width` pixels, without characters that do not print."""
    line = " ".join(prompt.split())
    line = "".join(character for character in line if character.isprintable())
    if len(line) <= width and measure(line) <= width:
        return line
    fits = bisect_right(range(min(len(line), width)), float(width), key=lambda end: measure(f"{line[:end].rstrip()}…"))
    return f"{line[: max(fits - 1, 0)].rstrip()}…"
