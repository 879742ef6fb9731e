"""Take the picture of the gallery: `python docs/scripts/gallery.py DIR`, a dataset with `sampling.loop: true`.

Left is the list on a desktop, right a 360° view on a phone, in a headless Chromium (needs the `test` extra).
"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

from PIL import Image

from madgen.monitoring.gallery import write_gallery

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests/support"))
from browser import PHONE, open_chromium, show_on

TARGET = Path(__file__).resolve().parents[1] / "images/gallery.jpg"
DESKTOP = (1120, PHONE[1])
GAP = 16
SETTLE_MS = 1500
SORTED = (
    "const order = document.getElementById('order'); order.value = 'coherence best';"
    "order.dispatchEvent(new Event('change'))"
)


def main() -> None:
    """Write `docs/images/gallery.jpg`."""
    with tempfile.TemporaryDirectory() as folder, open_chromium(Path(folder) / "profile") as driver:
        page = write_gallery(Path(sys.argv[1]), Path(folder) / "preview.html").as_uri()
        left = shot(driver, page, DESKTOP, False, SORTED)
        turned = "document.querySelectorAll('.card')[5].click(); document.getElementById('around').click()"
        right = shot(driver, page, PHONE, True, turned).resize(PHONE, Image.Resampling.LANCZOS)
    both = Image.new("RGB", (left.width + GAP + right.width, left.height), "white")
    both.paste(left, (0, 0))
    both.paste(right, (left.width + GAP, 0))
    both.save(TARGET, quality=82, optimize=True)


def shot(driver, page: str, size: tuple[int, int], phone: bool, script: str) -> Image.Image:  # type: ignore[no-untyped-def]
    """The page after the script, as RGB; twice as many pixels as `size` on a phone, which is shown dark."""
    show_on(driver, size, touch=phone, dark=phone)
    driver.get(page)
    driver.execute_script(script)
    driver.execute_async_script("setTimeout(arguments[1], arguments[0])", SETTLE_MS)
    return Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB")


if __name__ == "__main__":
    main()
