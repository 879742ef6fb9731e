"""Licences of weights, and of the pictures made with them."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from madgen import load_job
from madgen.dataset.card import _licence_header, _licence_text
from madgen.dataset.format import FormatError, Manifest, PlanTotals
from madgen.dataset.licences import licence_values
from madgen.hub.license import MODELS, TERMS, check_licences, licence_notes, licence_of, licences
from madgen.utils.errors import UserError


def backbone(*overrides):
    return load_job([], list(overrides)).backbone


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("license: MIT-0", None),
        ("license: mit", "mit"),
        ("license: 'openrail++'", "openrail++"),
        ("license: other\nlicense_name: flux-1-dev-non-commercial-license", "flux-1-dev-non-commercial-license"),
        ("license: other", None),
    ],
)
def test_licence_is_that_of_the_model_card(tmp_path, header, name):
    assert licence_of(str(tmp_path)).name is None
    (tmp_path / "README.md").write_text(f"---\ntags: [x]\n{header}\n---\n# A model\nlicense: none\n", encoding="utf-8")
    assert licence_of(str(tmp_path)).name == name
    (tmp_path / "lora.safetensors").touch()
    assert licence_of(str(tmp_path / "lora.safetensors")).name == name


def test_every_known_model_has_terms_with_a_source():
    assert set(MODELS.values()) == set(TERMS)
    for licence in TERMS.values():
        assert licence.source.startswith("https://")
        assert licence.training in ("yes", "restricted")


def test_presets_name_models_of_known_licence():
    from madgen.utils.resources import resource

    for file in resource("configs").glob("backbone/*.yaml"):
        assert licence_of(load_job(file).backbone.pretrained).name is not None, file.name


@pytest.mark.parametrize(
    "model", ["black-forest-labs/FLUX.1-dev", "stabilityai/stable-diffusion-3.5-large", "black-forest-labs/FLUX.2-dev"]
)
def test_restricted_training_must_be_accepted(model):
    with pytest.raises(UserError, match=rf"licence of {model}.*set backbone.accept_licence=true"):
        check_licences(backbone(f"backbone.pretrained={model}"))
    accepted = backbone(f"backbone.pretrained={model}", "backbone.accept_licence=true")
    check_licences(accepted)
    lines = licence_notes(accepted)
    assert len(lines) == 1
    assert "training on outputs: restricted" in lines[0]


def test_permissive_licences_pass_without_a_word():
    assert licence_notes(backbone("backbone.pretrained=black-forest-labs/FLUX.1-schnell")) == []


def test_unknown_licences_are_reported(tmp_path):
    lora = tmp_path / "lora.safetensors"
    lora.touch()
    lines = licence_notes(backbone(f"backbone.loras=[{{weights: {lora}}}]"))
    assert lines == [f"{lora}: licence unknown; check it before you publish pictures or train on them"]


def test_lora_of_a_restricted_licence_must_be_accepted(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense_name: stabilityai-ai-community\n---\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"set backbone\.accept_licence=true"):
        check_licences(backbone(f"backbone.loras=[{{weights: {tmp_path}}}]"))


def test_card_states_the_terms_of_every_model():
    job = load_job([], ["backbone.pretrained=black-forest-labs/FLUX.1-dev", "backbone.loras=[{weights: a/b}]"])
    recorded = licences(job.backbone)
    assert _licence_header([recorded]).splitlines() == [
        "license: other",
        "license_name: flux-1-dev-non-commercial-license",
        "license_link: https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md",
    ]
    text = _licence_text([SimpleNamespace(licence=recorded, job=job.as_dict())])
    assert "- backbone: flux-1-dev-non-commercial-license (training on outputs: restricted" in text
    assert "- LoRA 1: licence unknown" in text


def test_index_states_the_strictest_terms_of_all_weights():
    words = ["backbone.pretrained=black-forest-labs/FLUX.1-dev", "backbone.loras=[{weights: a/b}]", "name=job"]
    job = load_job([], words)
    manifest = Manifest("f", job.as_dict(), PlanTotals(1, 1, 1, 1, ""), licence=licences(job.backbone))
    values = licence_values(manifest, 0)
    assert values == {
        "weights_licence": "flux-1-dev-non-commercial-license; unknown",
        "training_on_outputs": "restricted",
        "commercial_use": "unknown",
        "licence_source": "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md",
    }
    earlier = replace(manifest, licence=None)
    assert licence_values(earlier, 0)["weights_licence"] == "unknown"
    damaged = replace(manifest, licence={"terms": {"nonsense": 1}})
    with pytest.raises(FormatError, match="its licences cannot be read"):
        licence_values(damaged, 0)


def test_card_of_an_earlier_dataset_states_what_it_recorded():
    job = load_job([], ["backbone.loras=[{weights: a/b}]"])
    assert _licence_header([{"backbone": "openrail++"}]) == "license: openrail++"
    assert _licence_header([{"backbone": None}]) == "license: unknown"
    text = _licence_text([SimpleNamespace(licence={"backbone": "openrail++"}, job=job.as_dict())])
    assert "- backbone: openrail++ (training on outputs: yes" in text
    assert "- LoRA 1: licence unknown" in text


def test_plan_notes_what_generate_refuses(madgen_here, job_file, tmp_path, tiny):
    (tmp_path / "model").mkdir()
    for part in tiny.iterdir():
        (tmp_path / "model" / part.name).symlink_to(part)
    (tmp_path / "model/README.md").write_text("---\nlicense_name: stabilityai-ai-community\n---\n", encoding="utf-8")
    planned = madgen_here("plan", job_file, "backbone.pretrained=model")
    assert planned.code == 0
    assert "note: model: stabilityai-ai-community (training on outputs: restricted" in planned.out
    refused = madgen_here("generate", job_file, "backbone.pretrained=model")
    assert refused.code == 2
    assert "if you comply with it, set backbone.accept_licence=true" in refused.err
    assert not (tmp_path / "out").exists()
    assert "licence unknown; check it before" in madgen_here("plan", job_file).out
