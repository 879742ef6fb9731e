"""Print the README's command that is marked `<!-- command: NAME -->`, so that CI runs what the README shows."""

import re
import sys
from pathlib import Path


def command(name: str) -> str:
    readme = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
    match = re.search(rf"<!-- command: {name} -->\s*```bash\n(.*?)```", readme, re.DOTALL)
    if match is None:
        sys.exit(f"README.md has no command marked {name!r}")
    return match.group(1).strip()


if __name__ == "__main__":
    print(command(sys.argv[1]))
