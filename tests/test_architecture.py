"""Import rules: each heavy library belongs to few packages, and imports flow one way."""

import ast
import re
from pathlib import Path

import pytest
from tiers import tier

TESTS = Path(__file__).resolve().parent
PACKAGE = TESTS.parent / "madgen"
HOMES = {
    "omegaconf": {"config"},
    "diffusers": {"backbones", "hub", "models"},
    "transformers": {"backbones", "hub", "models", "demo"},
    "lightning": {"generation", "cluster"},
    "wandb": {"monitoring"},
    "webdataset": {"dataset"},
    "fsspec": {"utils/filesystems.py"},
    "typer": {"cli"},
    "torchmetrics": {"models", "metrics", "evaluation"},
    "torch_fidelity": {"models", "metrics"},
    "matplotlib": {"evaluation"},
    "openTSNE": {"evaluation"},
    "triton": {"diffusion/kernels/triton_kernels.py"},
}
DIFFUSION_MAY_IMPORT = {
    "torch",
    "triton",  # comes with it
    "madgen",
    "math",
    "logging",
    "pathlib",
    "copy",
    "inspect",
    "sys",
    "collections",
    "contextlib",
    "dataclasses",
    "functools",
    "typing",
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module


def modules():
    return sorted(PACKAGE.rglob("*.py"))


def room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_respect_the_structure(path):
    for name in imports(path):
        top = name.partition(".")[0]
        here = {room(path), str(path.relative_to(PACKAGE))}
        assert here & HOMES.get(top, here), f"{name} belongs to {HOMES.get(top)}"
        if room(path) == "diffusion" and name != "__future__":
            assert top in DIFFUSION_MAY_IMPORT, f"diffusion imports {name}"


def test_rules_match_existing_imports():
    assert len(modules()) > 30
    assert "lightning" in set(imports(PACKAGE / "generation" / "module.py"))


def test_public_names_can_be_imported():
    import madgen

    assert all(getattr(madgen, name) is not None for name in madgen.__all__)
    with pytest.raises(AttributeError):
        madgen.nothing  # noqa: B018


def test_test_files_have_unique_names_and_import_no_conftest():
    """pytest collects them by their names alone, and there is more than one conftest.py."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    names = [path.name for path in files if path.name != "conftest.py"]
    assert sorted(set(names)) == sorted(names)
    assert [path for path in files if "conftest" in set(imports(path))] == []


def test_default_tier_covers_every_package(request):
    """A module with tests of this tier imports each package; every xdist worker collects all tests."""
    option = request.config.option
    if option.keyword or option.markexpr or [Path(path).resolve() for path in request.config.args] != [TESTS]:
        pytest.skip("only some of the tests are collected")
    modules = {item.path for item in request.session.items if tier(item) is None}
    text = "\n".join(path.read_text(encoding="utf-8") for path in modules)
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert {name for name in packages if not re.search(rf"\bmadgen\.{name}\b", text)} == set()
    assert any(path.parent.name == "parity" for path in modules)
