"""Tiers: plain `pytest` runs the tests without a marker of `TIERS`, `pytest --all` runs every test.

A marked test also runs where its file or its id is an argument, or where `-m` selects it.
"""

from __future__ import annotations

import atexit
import gc
import os
from collections import Counter
from pathlib import Path

import pytest

TIERS = ("slow", "slurm", "browser", "gpu")
SPREAD = (
    "backbones/test_work.py",
    "cli/test_locale.py",
    "cluster/test_launch.py",
    "cluster/test_signals.py",
    "dataset/test_upload_run.py",
    "demo/test_train.py",
    "generation/test_generate.py",
    "generation/test_out_of_memory.py",
    "invariants/test_loop_closure.py",
)
"""Modules with long tests that share no fixtures: their tests may run in several workers."""
LONGEST = (
    "slurm/test_requeue",
    "slurm/test_cluster",
    "backbones/test_work",
    "invariants/",
    "test_readme",
    "demo/",
    "test_docs",
    "generation/test_out_of_memory",
    "generation/test_generate",
    "cluster/test_signals",
    "cluster/test_launch",
    "slurm/test_guide",
)
"""Parts of the paths of modules that are started first, so that no worker is left with a long one at the end.

Two workers are busy with SLURM, which waits most of the time; the others start with tests that compute.
"""
NOT_RUN = pytest.StashKey[Counter]()


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", dest="all_tiers", help=f"also run tests marked {', '.join(TIERS)}")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """Return one per core, and with slow tests two more, which wait for SLURM and other processes."""
    return (os.cpu_count() or 1) + 2 * (config.option.all_tiers or "slow" in config.option.markexpr)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    for item in items:
        if "chromium_of_module" in item.fixturenames:
            item.add_marker("browser")
    if not (config.option.all_tiers or config.option.markexpr):
        deselect(config, items)
    items.sort(key=start_order)


def start_order(item) -> tuple[int, bool]:
    """Sort the longest modules to the front, in the order of `LONGEST`, and their marked tests first."""
    path = item.path.as_posix()
    position = next((index for index, part in enumerate(LONGEST) if part in path), len(LONGEST))
    return position, tier(item) is None


def tier(item) -> str | None:
    """Return the first marker of `TIERS` that a test has."""
    return next((name for name in TIERS if item.get_closest_marker(name)), None)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Keep a module's tests in one worker, which sets up its fixtures once, except those of `SPREAD`."""
    from xdist.scheduler import LoadScopeScheduling

    class ModuleScheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            module = nodeid.partition("::")[0]
            return nodeid if module.endswith(SPREAD) else module

    return ModuleScheduling(config, log)


def deselect(config, items) -> None:
    """Drop marked tests, except those of files that are arguments, and count them by tier."""
    named = {Path(argument.partition("::")[0]).resolve() for argument in config.args}
    dropped = [item for item in items if tier(item) and item.path not in named]
    if dropped:
        config.stash[NOT_RUN] = Counter(map(tier, dropped))
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in set(dropped)]


def pytest_collection_finish():
    freeze()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    if nextitem is None or nextitem.path != item.path:
        freeze()


def freeze() -> None:
    """Exempt the objects of imported modules from garbage collection, a pass over which takes most of a second."""
    gc.collect()
    gc.freeze()


atexit.register(gc.unfreeze)  # later than pytest's own collections of garbage


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["not_run"] = dict(session.config.stash.get(NOT_RUN, {}))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """In the controller of xdist, which collects nothing: take the counts of a worker."""
    node.config.stash[NOT_RUN] = Counter(getattr(node, "workeroutput", {}).get("not_run", {}))


def pytest_terminal_summary(terminalreporter, config):
    if counts := config.stash.get(NOT_RUN, None):
        listed = ", ".join(f"{counts[name]} {name}" for name in TIERS if counts[name])
        terminalreporter.write_line(f"{counts.total()} tests not run ({listed}); pytest --all runs them")
