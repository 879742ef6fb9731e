"""Safety checking of panoramas with a tiny random checker whose threshold lies between two crops."""

import io
import itertools
import json
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from madgen import PanoramaSampler, UserError
from madgen.config.schema import SafetyConfig, SamplingConfig
from madgen.generation.robust_sampler import RobustSampler
from madgen.generation.safety import Safety, blurred
from madgen.images.crops import covering_squares
from madgen.models import safety_checker as _safety
from madgen.types import Prompt, Task

SIDE = 32
"""Side in pixels of a view, and so of a crop, of the tiny backbone."""


@pytest.fixture(scope="module")
def random_checker(tmp_path_factory):
    """Folder of a checker in the pipeline layout that flags nothing."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checker") / "pipeline"
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**sizes, "image_size": SIDE, "patch_size": 8}
    model = StableDiffusionSafetyChecker(
        CLIPConfig(text_config={**sizes, "vocab_size": 10}, vision_config=vision, projection_dim=8)
    )
    model.concept_embeds_weights[:] = 2.0  # no cosine is as large
    model.special_care_embeds_weights[:] = 2.0
    model.save_pretrained(folder / "safety_checker")
    extractor = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    extractor.save_pretrained(folder / "feature_extractor")
    return folder


def flagging(checker, folder, shown, hidden):
    """Copy a checker so that it flags the images `shown` and not those in `hidden`."""
    shutil.copytree(checker, folder)
    loaded = _safety.load(str(checker))
    embedded = []
    with torch.no_grad():
        for image in (*shown, *hidden):
            pixels = loaded.extractor(image, return_tensors="pt", input_data_format="channels_last").pixel_values
            embedded.append(torch.nn.functional.normalize(loaded.model.visual_projection(
                loaded.model.vision_model(pixels)[1])))  # fmt: skip
    first, others = torch.cat(embedded[: len(shown)]), torch.cat(embedded[len(shown) :])
    concept = torch.nn.functional.normalize(first.mean(0) - others.mean(0), dim=0)
    least, most = float((first @ concept).min()), float((others @ concept).max())
    assert least - most > 0.002, "the checker cannot tell these pictures apart"
    file = folder / "safety_checker/model.safetensors"
    weights = load_file(file)
    weights["concept_embeds"][3], weights["concept_embeds_weights"][3] = concept, (least + most) / 2
    save_file(weights, file, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def striped(random_checker, tmp_path_factory):
    """A checker that flags black and white stripes, not plain grey."""
    stripes = np.zeros((SIDE, SIDE, 3), np.uint8)
    stripes[:, ::4] = 255
    grey = np.full_like(stripes, 128)
    folder = tmp_path_factory.mktemp("checker") / "striped"
    return flagging(random_checker, folder, [stripes], [grey]), stripes, grey


@pytest.mark.parametrize(("height", "width", "size"), list(itertools.product((3, 8, 20), (5, 8, 21), (4, 8, 50))))
def test_squares_cover_every_pixel_and_end_at_the_border(height, width, size):
    covered = np.zeros((height, width), int)
    for left, top, right, bottom in covering_squares(height, width, size):
        assert (right - left, bottom - top) == (min(size, width), min(size, height))
        covered[top:bottom, left:right] += 1
    assert covered.min() == 1
    assert covered[: height // size * size, : width // size * size].max(initial=1) <= 4
    if height % size == width % size == 0:
        assert covered.max() == 1


def test_checker_agrees_with_diffusers(random_checker, striped):
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPImageProcessor

    folder, stripes, grey = striped
    ours = _safety.load(str(folder))
    model = StableDiffusionSafetyChecker.from_pretrained(folder / "safety_checker")
    extractor = CLIPImageProcessor.from_pretrained(folder / "feature_extractor")
    pictures = [stripes, grey, 255 - stripes]
    given = extractor([Image.fromarray(picture) for picture in pictures], return_tensors="pt").pixel_values
    _, theirs = model(clip_input=given, images=[np.zeros((2, 2))] * len(pictures))
    assert [ours.flags(picture) for picture in pictures] == theirs
    assert theirs[:2] == [True, False]


def test_only_the_boxes_are_blurred():
    picture = np.zeros((64, 160, 3), np.uint8)
    picture[:, 2::5] = 255
    changed = blurred(picture, [[64, 0, 128, 64]])
    assert np.array_equal(changed[:, :64], picture[:, :64])
    assert np.array_equal(changed[:, 128:], picture[:, 128:])
    assert changed[16:48, 80:112].std() < 0.05 * picture[16:48, 80:112].std()
    assert abs(changed[:, 64:128].mean() - picture[:, 64:128].mean()) < 6


@pytest.mark.parametrize("action", ["keep", "blur", "drop"])
def test_each_action_is_applied_and_recorded(tiny, striped, monkeypatch, action):
    """One panorama has a striped middle crop, the other is plain grey."""
    folder, stripes, grey = striped
    sampler = PanoramaSampler.from_pretrained(str(tiny), dtype="float32", mad_steps=0)
    safety = Safety.load(SafetyConfig(checker=str(folder), action=action), sampler)
    assert safety.size == SIDE
    attempts = RobustSampler(sampler, SamplingConfig(num_inference_steps=1, guidance_scale=1.0), safety)
    harmless = grey.copy()
    harmless[0, 0] = 0  # or it would show nothing
    pictures = iter([np.concatenate([grey, stripes, grey], 1), np.concatenate([harmless, grey, grey], 1)])
    monkeypatch.setattr("madgen.generation.robust_sampler.to_uint8", lambda pixels: next(pictures)[None])
    tasks = [Task(f"{i}-0000", Prompt(str(i), "hills", "", 32, 96), 0, i) for i in range(2)]
    shown, plain = attempts(tasks)
    assert shown.changes == {"safety": {"flagged": [[32, 0, 64, 32]], "action": action}}
    assert plain.changes == {"safety": {"flagged": [], "action": action}}
    assert np.array_equal(plain.image_HWC, np.concatenate([harmless, grey, grey], 1))
    assert "safety" in attempts.seconds
    if action == "drop":
        assert (shown.image_HWC, shown.reason) == (None, "unsafe")
        assert shown.detail == "the safety checker flagged 1 of 3 crops"
        return
    assert shown.reason is None
    assert np.array_equal(shown.image_HWC[:, 32:64], stripes) == (action == "keep")
    assert np.array_equal(shown.image_HWC[:, :32], grey)
    assert shown.image_HWC[:, 32:64].std() < (128 if action == "keep" else 20)


def read(shards):
    found = {}
    for path in sorted(shards.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(("png", "json")):
                    key, _, kind = member.name.partition(".")
                    data = tar.extractfile(member).read()
                    content = json.loads(data) if kind == "json" else np.array(Image.open(io.BytesIO(data)))
                    found.setdefault(key, {})[kind] = content
    return found


@pytest.mark.slow
def test_regenerate_applies_the_checker_and_another_checker_is_another_job(madgen, job_file, random_checker, tmp_path):
    job = (job_file, "prompts.limit=1", "sampling.width=80")
    assert madgen("generate", *job, "output.dir=plain").code == 0
    plain = read(tmp_path / "plain/shards")
    assert all(sample["json"]["safety"] is None for sample in plain.values())
    pictures = [sample["png"] for sample in plain.values()]
    boxes = covering_squares(32, 80, SIDE)
    assert boxes == [[0, 0, 32, 32], [32, 0, 64, 32], [48, 0, 80, 32]]
    cut = [[picture[top:bottom, left:right] for left, top, right, bottom in boxes] for picture in pictures]
    checker = flagging(random_checker, tmp_path / "checker", [cut[0][1]], [cut[0][0], *cut[1]])
    checked = (*job, f"safety.checker={checker}", "safety.action=blur")
    result = madgen("generate", *checked)
    assert result.code == 0, result.err
    made = read(tmp_path / "out/shards")
    for index, (key, sample) in enumerate(made.items()):
        recorded = sample["json"]["safety"]
        assert ("checker" in recorded, recorded["action"]) == (False, "blur")
        assert (boxes[1] in recorded["flagged"]) == (index == 0)
        assert np.array_equal(sample["png"], blurred(plain[key]["png"], recorded["flagged"]))
        again = madgen("regenerate", "out", key, "-o", "again.png")
        assert (again.code, "the same pixels" in again.out) == (0, True), again.err + again.out
    refused = madgen("generate", *job)
    assert (refused.code, "safety" in refused.err) == (2, True), refused.err
    refused = madgen("generate", *checked, "safety.action=keep")
    assert (refused.code, "safety.action: blur there, keep here" in refused.err) == (2, True), refused.err
    config = checker / "feature_extractor/preprocessor_config.json"
    config.write_text(config.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    refused = madgen("regenerate", "out", next(iter(made)), "-o", "other.png")
    assert (refused.code, "are not those of the sample" in refused.err) == (2, True), refused.err


@pytest.fixture
def strict(random_checker, tmp_path):
    """A checker that flags everything."""
    folder = tmp_path / "strict"
    shutil.copytree(random_checker, folder)
    weights = load_file(folder / "safety_checker/model.safetensors")
    weights["concept_embeds_weights"][:] = -2.0
    save_file(weights, folder / "safety_checker/model.safetensors", metadata={"format": "pt"})
    return folder


def test_dropped_panoramas_do_not_trip_the_circuit_breaker(madgen, job_file, strict, tmp_path):
    """All ten are quarantined although the breaker allows no failure."""
    dropped = (f"safety.checker={strict}", "safety.action=drop", "quarantine.max_share=0", "quarantine.window=2")
    result = madgen("generate", job_file, *dropped)
    assert result.code == 4, result.err
    reasons = [
        json.loads(line)["reason"]
        for line in (tmp_path / "out/quarantine.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert reasons == ["unsafe"] * 10


def test_sample_command_applies_the_checker(madgen_here, tiny, strict, tmp_path):
    run = ("sample", "hills", f"backbone.pretrained={tiny}", "method.mad.steps=0", "sampling.num_inference_steps=1",
           "sampling.height=32", "sampling.width=64", f"safety.checker={strict}", "-o", "p.png")  # fmt: skip
    kept = madgen_here(*run)
    assert (kept.code, "flagged 2 of 2 crops: [[0, 0, 32, 32], [32, 0, 64, 32]]" in kept.err) == (0, True), kept.err
    (tmp_path / "p.png").unlink()
    dropped = madgen_here(*run, "safety.action=drop")
    assert (dropped.code, "not written, because safety.action=drop" in dropped.err) == (2, True), dropped.err
    assert not (tmp_path / "p.png").exists()


def without(*names):
    def change(folder):
        for name in names:
            (folder / name).unlink()

    return change


def of_another_kind(folder):
    config = folder / "safety_checker/config.json"
    config.write_text(
        json.dumps({**json.loads(config.read_text(encoding="utf-8")), "architectures": ["CLIPModel"]}), encoding="utf-8"
    )


def lacking_weights(folder):
    file = folder / "safety_checker/model.safetensors"
    weights = load_file(file)
    del weights["concept_embeds"]
    save_file(weights, file, metadata={"format": "pt"})


def pickled(folder):
    file = folder / "safety_checker/model.safetensors"
    torch.save(load_file(file), folder / "safety_checker/pytorch_model.bin")
    file.unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("safety_checker/config.json"), "is a folder without safety_checker/config.json: not a safety checker"),
        (without("feature_extractor/preprocessor_config.json"), "is a folder without feature_extractor/preprocessor"),
        (of_another_kind, "contains no safety checker: its architectures are ['CLIPModel']"),
        (lacking_weights, "lacks weights: concept_embeds"),
        (pickled, "cannot load safety.checker="),
        (lambda folder: (folder / "safety_checker/config.json").write_text("{", encoding="utf-8"), "is not valid JSON"),
    ],
)
def test_invalid_checker_is_an_error_before_anything_is_written(
    madgen_here, job_file, random_checker, tmp_path, change, message
):
    folder = tmp_path / "broken"
    shutil.copytree(random_checker, folder)
    change(folder)
    refused = madgen_here("generate", job_file, f"safety.checker={folder}")
    assert (refused.code, len(refused.err.strip().splitlines())) == (2, 1), refused.err
    assert message in refused.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("checker", "message"),
    [
        ("no-such-folder", "safety.checker='no-such-folder' is neither a folder, nor a Hub id (owner/name)"),
        ("nobody/no-such-checker", "in the local Hub cache, and the Hub is not reachable"),
        (".", "is a folder without config.json: not a safety checker"),
    ],
)
def test_missing_checker_is_an_error_before_anything_is_written(madgen_here, job_file, tmp_path, checker, message):
    refused = madgen_here("generate", job_file, f"safety.checker={checker}")
    assert (refused.code, len(refused.err.strip().splitlines())) == (2, 1), refused.err
    assert message in refused.err
    assert not (tmp_path / "out").exists()


def test_checker_in_a_separate_folder(random_checker, tmp_path):
    folder = tmp_path / "own"
    shutil.copytree(random_checker / "safety_checker", folder)
    with pytest.raises(UserError, match="without preprocessor_config"):
        _safety.load(str(folder))
    shutil.copy(random_checker / "feature_extractor/preprocessor_config.json", folder)
    assert not _safety.load(str(folder)).flags(np.zeros((40, 40, 3), np.uint8))
