"""A deferred import loads its library when an attribute is first read, whichever way it is imported."""

import subprocess
import sys

import pytest
from forks import WAIT_S

PACKAGE = """
import time
import {name}  # as libraries do
from {name}.part import VALUE
time.sleep({seconds})
from {name} import part
LOADED = True
"""


def run(folder, code, seconds=0.0):
    """Run code in an interpreter in which the package `heavy` is deferred."""
    (folder / "heavy").mkdir()
    (folder / "heavy" / "__init__.py").write_text(PACKAGE.format(name="heavy", seconds=seconds), encoding="utf-8")
    part = "import sys\nassert not hasattr(sys, 'part'), 'loaded twice'\nVALUE = sys.part = 1\n"
    (folder / "heavy" / "part.py").write_text(part, encoding="utf-8")
    (folder / "heavy" / "other.py").write_text("OTHER = 2\n", encoding="utf-8")
    lines = ["import sys", f"sys.path.insert(0, {str(folder)!r})"]
    lines += ["from madgen.utils.deferred_import import defer_import", "defer_import('heavy')"]
    command = [sys.executable, "-c", "\n".join([*lines, code])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "use",
    [
        "import heavy; heavy.LOADED",
        "from heavy import LOADED",
        "import heavy.part",
        "from heavy.part import VALUE",
        "from heavy.other import OTHER; assert OTHER == 2",
    ],
)
def test_import_statements_load_on_use(tmp_path, use):
    unused = "import heavy; import heavy as other; assert heavy is other and 'heavy.part' not in sys.modules"
    used = "import heavy; assert type(heavy) is type(sys) and heavy.LOADED and heavy.part.VALUE == 1"
    run(tmp_path, f"{unused}\n{use}\n{used}")


def test_missing_attributes_are_reported_as_usual(tmp_path):
    run(
        tmp_path,
        "import heavy\ntry:\n    heavy.nothing\nexcept AttributeError as error:\n    assert 'heavy' in str(error)",
    )


def test_threads_wait_until_the_library_is_loaded(tmp_path):
    code = """
import heavy
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(4) as pool:
    assert all(pool.map(lambda _: heavy.LOADED, range(4)))
"""
    run(tmp_path, code, seconds=0.2)


def test_packages_that_are_loaded_or_missing_stay_as_they_are(tmp_path):
    code = """
import heavy; heavy.LOADED
defer_import('heavy'); defer_import('no_such_package')
assert sys.modules['heavy'] is heavy and 'no_such_package' not in sys.modules
"""
    run(tmp_path, code)
