"""Weights are identified by their content, whatever the layout of the folder."""

import shutil

from madgen.demo import WEIGHTS
from madgen.hub.weights import weights_id


def linked(folder, components):
    """A pipeline folder whose components are links to folders elsewhere."""
    folder.mkdir()
    shutil.copy(WEIGHTS / "model_index.json", folder)
    for name, target in components.items():
        (folder / name).symlink_to(target)
    return folder


def test_symlinked_components_are_part_of_the_identity(tmp_path):
    components = {path.name: path for path in WEIGHTS.iterdir() if path.is_dir()}
    assert weights_id(str(linked(tmp_path / "linked", components))) == weights_id(str(WEIGHTS))
    other = shutil.copytree(WEIGHTS / "unet", tmp_path / "unet")
    config = other / "config.json"
    config.write_text(config.read_text(encoding="utf-8").replace("{", "{ ", 1), encoding="utf-8")
    assert weights_id(str(linked(tmp_path / "other", {**components, "unet": other}))) != weights_id(str(WEIGHTS))


def test_a_link_to_a_parent_folder_is_not_followed(tmp_path):
    folder = shutil.copytree(WEIGHTS, tmp_path / "model")
    (folder / "unet" / "parent").symlink_to(folder)
    assert weights_id(str(folder)) == weights_id(str(WEIGHTS))
