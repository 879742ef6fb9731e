"""The contact sheet: panoramas of a dataset on one PNG."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from madgen.dataset.layout import DatasetDir
from madgen.dataset.reader import Sample
from madgen.monitoring.gallery.samples import decoded, find_inputs, load_inputs, present_samples, read, spread
from madgen.types import PictureFile
from madgen.utils.atomic import atomic
from madgen.utils.errors import UserError

SHEET_PICTURE = (768, 256)
"""Maximum width and height of an image in pixels."""
SHEET_CELL = 192
"""Minimum width of a cell in pixels, so that prompts fit below small images."""
SHEET_ROWS = 8
SHEET_MAX = 240
SHEET_GAP = 16
SHEET_CAPTION = 24
SHEET_FONT = 14
SHEET_PAPER, SHEET_INK = (250, 250, 248), (40, 40, 44)


def write_contact_sheet(directory: Path, output: Path | None = None, limit: int = 24) -> Path:
    """Write a PNG with columns of panoramas and their prompts; return its path.

    directory: as in `write_gallery`
    output: the image, replaced by rename; default `directory/preview.png`
    limit: maximum number of samples, evenly spaced over the dataset; 1 to `SHEET_MAX`

    Raises UserError if there is no dataset or no sample, if a shard is damaged, or for a limit out of range.
    """
    dataset = DatasetDir(Path(directory))
    if limit > SHEET_MAX:
        raise UserError(f"a contact sheet holds at most {SHEET_MAX} panoramas, not limit={limit}; write the gallery")
    dataset.read_manifest()
    shown = spread(present_samples(dataset), limit)
    inputs = find_inputs(dataset, shown)
    sheet = _sheet([(_picture(read(dataset, entry), inputs), entry.prompt) for entry in shown])
    output = dataset.root / "preview.png" if output is None else Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic(output) as file:
        sheet.save(file, format="PNG")
    return output


def _picture(sample: Sample, inputs: Mapping[str, PictureFile]) -> Image.Image:
    """Return a panorama to the right of the pictures that it started from or followed, all of one height."""
    panorama = decoded(sample, SHEET_PICTURE)
    left = [image for name, image in load_inputs(sample.metadata, inputs).items() if name != "mask"]
    for image in left:
        image.thumbnail((SHEET_PICTURE[0], panorama.height), Image.Resampling.LANCZOS)
    width = sum(image.width + SHEET_GAP for image in left) + panorama.width
    row, x = Image.new("RGB", (width, panorama.height), SHEET_PAPER), 0
    for image in (*left, panorama):
        row.paste(image, (x, panorama.height - image.height))
        x += image.width + SHEET_GAP
    return row


def _columns(cells: Sequence[tuple[Image.Image, str]]) -> int:
    """Return the number of columns: one per `SHEET_ROWS` wide images; as many as rows for others."""
    wide = sum(image.width >= 2 * image.height for image, _ in cells) * 2 >= len(cells)
    square = next(side for side in range(1, len(cells) + 1) if side * side >= len(cells))
    minimum = -(-len(cells) // SHEET_ROWS)
    return minimum if wide else max(minimum, square)


def _sheet(cells: Sequence[tuple[Image.Image, str]]) -> Image.Image:
    """Draw pairs of image and prompt column by column."""
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
    """Truncate a prompt to one line of at most `width` pixels, without unprintable characters."""
    line = " ".join(prompt.split())
    line = "".join(character for character in line if character.isprintable())
    if len(line) <= width and measure(line) <= width:
        return line
    fits = bisect_right(range(min(len(line), width)), float(width), key=lambda end: measure(f"{line[:end].rstrip()}…"))
    return f"{line[: max(fits - 1, 0)].rstrip()}…"
