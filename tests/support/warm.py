"""Imported by a server of processes (multiprocessing's forkserver): what its forks need not import again, 9 s of it.

Loading a pipeline imports the parts of diffusers and transformers that load lazily; nothing is sampled here.
"""

import pandas  # noqa: F401 -- pyarrow imports it when it makes its first table

from madgen.sampling.sampler import PanoramaSampler

PanoramaSampler.from_pretrained("demo")
