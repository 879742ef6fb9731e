"""Imports the parts of W&B that `wandb.init` would import, some 0.1 s of processor time.

Its data models search all modules that are loaded for their own source: with torch and diffusers among these it takes
three times as long, and runs beside the sampling.
"""

import contextlib

import wandb

with contextlib.suppress(ImportError):  # a part that W&B may move
    import wandb.sdk.launch.inputs.internal  # noqa: F401
