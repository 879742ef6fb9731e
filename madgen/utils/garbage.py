"""Garbage collection, which would take a fifth of the time of imports and of loading models, and find nothing."""

import atexit
import gc

USUALLY = gc.get_threshold()
RARELY = (100_000, 50, 100)


def collect_rarely() -> None:
    """Collect garbage rarely, while libraries are imported and models are loaded."""
    gc.set_threshold(*RARELY)


def collect_usually() -> None:
    """After `collect_rarely`, collect garbage as usual again, but pass over all objects that exist now."""
    if gc.get_threshold() == RARELY:
        gc.freeze()
        atexit.register(gc.unfreeze)  # or extension modules report leaks at the end
        gc.set_threshold(*USUALLY)
