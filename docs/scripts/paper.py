"""Collect the results of the paper's jobs into docs/paper-demo.md: `python docs/scripts/paper.py out/paper-demo`.

Run `madgen paper jobs/paper/NAME.yaml --demo -o out/paper-demo` for each table and for Figures 8, 9 and 10 first.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

DOCS = Path(__file__).resolve().parents[1]
IMAGES = "images/paper"
NAMES = ("table1", "table2", "table3", "table4", "fig8", "fig9", "fig10")
INTRODUCTION = f"""# The paper's tables and figures, with the demo backbone

Results of `madgen paper jobs/paper/NAME.yaml --demo` on two CPU cores. They show that the jobs work, and how the
metrics behave on a toy model that knows skies and grounds. The numbers are not comparable with the paper's. Figures 3
and 4 are pictures: [Figure 3]({IMAGES}/fig3.jpg), [Figure 4]({IMAGES}/fig4.jpg).
"""


def main() -> None:
    """Write one page with all tables, and the pictures with few colors, so that they stay small."""
    parts = [INTRODUCTION]
    for name in NAMES:
        results = Path(sys.argv[1], name)
        text = next(results.glob("*.md")).read_text(encoding="utf-8").strip().replace("\n## ", "\n### ")
        parts.append(f"#{text}\n\n`jobs/paper/{name}.yaml`\n")
        for picture in sorted(results.glob("*.png")):
            target = f"{IMAGES}/{picture.name if picture.stem == name else f'{name}-{picture.name}'}"
            Image.open(picture).convert("RGB").quantize(64).save(DOCS / target, optimize=True)
            parts.append(f"![{picture.stem} of {name}]({target})\n")
    (DOCS / "paper-demo.md").write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
