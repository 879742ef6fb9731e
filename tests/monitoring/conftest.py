"""Fixtures of the gallery in a browser."""

import pytest
from gallery_dataset import HOSTILE, MANY, add_shard, new_dataset

from madgen.monitoring import gallery


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Hostile prompts, scores of some, and many more samples."""
    directory = new_dataset(tmp_path_factory.mktemp("gallery") / "data", name="<i>job</i>")
    prompts = [HOSTILE, "Hills at Noon", "hills at night", "the sea"]
    scores = [{"seam": 1.5}, {"seam": 1.1, "coherence": 0.5}, {"coherence": 0.9}, {"seam": 1.2, "coherence": 0.7}]
    add_shard(directory, 0, prompts, scores=scores)
    add_shard(directory, 1, [f"filler {number}" for number in range(MANY)], width=64, height=16)
    return gallery.write_gallery(directory)


@pytest.fixture
def visit(chromium):
    """Opens a page; in the end nothing has been refused, has failed, or has been asked of a network."""

    def go(path):
        chromium.get(path.as_uri())
        return chromium

    yield go
    assert [said for said in chromium.get_log("browser") if said["level"] == "SEVERE"] == []
    names = chromium.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert all(name.startswith(("data:", "blob:")) for name in names), names
