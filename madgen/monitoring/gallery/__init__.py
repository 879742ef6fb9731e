"""Previews of a dataset, complete or not: a self-contained HTML gallery and a contact sheet.

`page.py` fills the templates `page.html`, `page.css` and the scripts.
"""

from madgen.monitoring.gallery.page import write_gallery
from madgen.monitoring.gallery.sheet import write_contact_sheet

__all__ = ["write_contact_sheet", "write_gallery"]
