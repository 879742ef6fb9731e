"""Collects what the paper's jobs drew into docs/paper: `python docs/paper.py out/paper-demo`.

Made before by `madgen paper jobs/paper/NAME.yaml --demo -o out/paper-demo` of each table and of Figures 8, 9 and 10.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

HERE = Path(__file__).resolve().parent / "paper"
NAMES = ("table1", "table2", "table3", "table4", "fig8", "fig9", "fig10")
INTRODUCTION = """# The paper's tables and figures, with the demo backbone

Made by `madgen paper jobs/paper/NAME.yaml --demo`, on two CPU cores. They show that the jobs work,
and what the scores say of a toy that knows skies and grounds; the numbers are none of the paper's. Figures 3 and 4
are pictures: [fig3.jpg](fig3.jpg), [fig4.jpg](fig4.jpg).
"""


def main() -> None:
    """Pictures with few colours, so that they stay small; tables in one page."""
    parts = [INTRODUCTION]
    for name in NAMES:
        made = Path(sys.argv[1], name)
        text = next(made.glob("*.md")).read_text().strip().replace("\n## ", "\n### ")
        parts.append(f"#{text}\n\n`jobs/paper/{name}.yaml`\n")
        for picture in sorted(made.glob("*.png")):
            target = HERE / (picture.name if picture.stem == name else f"{name}-{picture.name}")
            Image.open(picture).convert("RGB").quantize(64).save(target, optimize=True)
            parts.append(f"![{picture.stem} of {name}]({target.name})\n")
    (HERE / "README.md").write_text("\n".join(parts))


if __name__ == "__main__":
    main()
