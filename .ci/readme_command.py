"""Prints the README's command that is marked `<!-- command: NAME -->`, so that what is promised is what runs."""

import re
import sys
from pathlib import Path


def command(name: str) -> str:
    readme = (Path(__file__).resolve().parent.parent / "README.md").read_text()
    found = re.search(rf"<!-- command: {name} -->\s*```bash\n(.*?)```", readme, re.DOTALL)
    if found is None:
        sys.exit(f"README.md marks no command {name!r}")
    return found.group(1).strip()


if __name__ == "__main__":
    print(command(sys.argv[1]))
