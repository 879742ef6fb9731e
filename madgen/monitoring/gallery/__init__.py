"""Two looks at a dataset, finished or still growing: a self-contained `preview.html`, and a contact sheet as a PNG.

`page.html`, `page.css` and the scripts beside this file are what the browser gets; `page.py` fills them.
"""

from madgen.monitoring.gallery.page import write_gallery
from madgen.monitoring.gallery.sheet import write_contact_sheet

__all__ = ["write_contact_sheet", "write_gallery"]
