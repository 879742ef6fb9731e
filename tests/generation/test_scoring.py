"""Scores of a run on the tiny backbone, in JSON, sidecar and index."""

import io
import json
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from processes import begin, environment

from madgen import UserError
from madgen.config.loader import load_job
from madgen.generation.scoring import PixelScores, clip_score
from madgen.images.crops import covering_squares
from madgen.images.scores import coherence, seam, wrap
from madgen.models import clip as _clip
from madgen.planning.resolved_run import ResolvedRun

CELL = 4
BORDERS = list(range(8, 64, 8))
"""On a closed loop of 64 px the tiny backbone has views of 32 px every 8 px."""


def read(folder):
    """Return image, JSON and sidecar entry by key."""
    found = {}
    for path in sorted((folder / "shards").glob("*.tar")):
        entries = {
            entry["key"]: entry
            for entry in json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["samples"]
        }
        with tarfile.open(path) as tar:
            content = {member.name: tar.extractfile(member).read() for member in tar}
        for key, entry in entries.items():
            image = np.asarray(Image.open(io.BytesIO(content[f"{key}.png"])))
            found[key] = image, json.loads(content[f"{key}.json"]), entry
    return found


def tars(folder):
    return [path.read_bytes() for path in sorted((folder / "shards").glob("*.tar"))]


def of_pixels(image):
    values = {"seam": seam(image, [], BORDERS, CELL), "wrap": wrap(image, CELL), "coherence": coherence(image)}
    return {name: round(value, 4) for name, value in values.items()}


@pytest.mark.slow
def test_scores_do_not_depend_on_batch_rank_or_shard(madgen, job_file, tmp_path):
    """`filter` and `regenerate` work on the dataset as well."""
    from pyarrow import parquet

    job = (job_file, "sampling.loop=true")
    runs = {"one": [], "two": ["trainer.devices=2"], "batched": ["sampling.batch_size=4", "output.samples_per_shard=5"]}
    for name, options in runs.items():
        result = madgen("generate", *job, f"output.dir={name}", *options)
        assert result.code == 0, result.err
        made = read(tmp_path / name)
        assert len(made) == 10
        for image, metadata, entry in made.values():
            assert metadata["scores"] == entry["scores"] == of_pixels(image)
    assert tars(tmp_path / "two") == tars(tmp_path / "one")
    made = read(tmp_path / "one")
    rows = parquet.read_table(tmp_path / "one/index.parquet").to_pylist()
    names = ("seam", "wrap", "coherence")
    assert [{name: row[name] for name in names} for row in rows] == [entry["scores"] for *_, entry in made.values()]
    assert {row["clip"] for row in rows} == {None}

    values = sorted(metadata["scores"]["coherence"] for _, metadata, _ in made.values())
    result = madgen("filter", "one", "--where", f"coherence >= {values[6]}", "-o", "chosen")
    assert result.code == 0, result.err
    assert result.out == "chosen: 4 of 10 samples\n"
    verified = madgen("verify", "chosen")
    assert (verified.code, verified.out) == (0, "4 of 4 panoramas present: as planned\n")
    key = next(iter(read(tmp_path / "chosen")))
    again = madgen("regenerate", "chosen", key, "-o", "again.png")
    assert (again.code, "the same pixels" in again.out) == (0, True), again.out + again.err
    refused = madgen("generate", *job, "output.dir=chosen")
    assert (refused.code, "holds what madgen filter chose of a dataset" in refused.err) == (2, True), refused.err


def test_recovered_samples_keep_their_scores(madgen_here, job_file, tmp_path):
    """A shard without its sidecar and a shard with a damaged sample are restored."""
    assert madgen_here("generate", job_file, "prompts.limit=3").code == 0
    before, made = tars(tmp_path / "out"), read(tmp_path / "out")
    assert all(set(entry["scores"]) == {"seam", "coherence"} for *_, entry in made.values())
    (tmp_path / "out/shards/job-000000.json").unlink()
    again = madgen_here("generate", job_file, "prompts.limit=3")
    assert (again.code, "; 3 generated in" in again.err) == (0, True), again.err
    assert {key: entry for key, (*_, entry) in read(tmp_path / "out").items()} == {
        key: entry for key, (*_, entry) in made.items()
    }
    tar = tmp_path / "out/shards/job-000001.tar"
    data = bytearray(tar.read_bytes())
    data[list(made.values())[4][2]["offset"] + 600] ^= 1
    tar.write_bytes(data)
    assert madgen_here("verify", "out", "--repair").code == 1
    mended = madgen_here("generate", job_file, "prompts.limit=3")
    assert (mended.code, "; 1 generated in" in mended.err) == (0, True), mended.err
    assert tars(tmp_path / "out") == before
    assert [entry["scores"] for *_, entry in read(tmp_path / "out").values()] == [
        entry["scores"] for *_, entry in made.values()
    ]


def test_changed_scores_are_another_job(madgen_here, job_file, tmp_path):
    plain = (job_file, "prompts.limit=1", "scores.enabled=[]")
    assert madgen_here("generate", *plain).code == 0
    assert all(
        "scores" not in metadata and "scores" not in entry for _, metadata, entry in read(tmp_path / "out").values()
    )
    refused = madgen_here("generate", job_file, "prompts.limit=1")
    assert (refused.code, "scores: null there, {'pixels': ['seam', 'coherence']" in refused.err) == (2, True), (
        refused.err
    )
    assert madgen_here("generate", *plain).code == 0
    refused = madgen_here("filter", "out", "--where", "seam < 2", "-o", "new")
    assert (refused.code, "out has no scores; generate records them" in refused.err) == (2, True), refused.err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--where", "__import__('os').system('touch hacked')", "-o", "new"],
        ["--where", "(" * 999 + "seam > 1" + ")" * 999, "-o", "new"],
        ["--where", "not " * 400 + "seam", "-o", "new"],
        ["--where", "seam > " + "9" * 1900, "-o", "new"],
        ["--where", "seam > 1e999", "-o", "new"],
        ["--where", "sharpness > 1", "-o", "new"],
        ["--where", "wrap > 1", "-o", "new"],
        ["--where", "seam > 1000", "-o", "new"],
        ["--where", "seam > 0"],
        ["--where", "seam > 0", "-o", "new", "--keys", "keys.txt"],
        ["--where", "seam > 0", "-o", "out"],
        ["--where", "seam > 0", "-o", "prompts.txt"],
        ["--where", "seam > 0", "--keys", "prompts.txt"],
        ["-o", "new"],
        ["--best", "1", "-o", "new"],
        ["--best", "0", "--by", "seam", "-o", "new"],
        ["--best", "one", "--by", "seam", "-o", "new"],
        ["--by", "beauty", "--best", "1", "-o", "new"],
    ],
)
def test_invalid_filter_is_an_error_and_writes_nothing(refused, scored, arguments):
    assert "Traceback" not in refused("filter", "out", *arguments)


@pytest.fixture(scope="module")
def one_shard(tmp_path_factory, tiny):
    """A dataset of two panoramas."""
    folder = tmp_path_factory.mktemp("scored")
    (folder / "prompts.txt").write_text("a hill\na lake\n", encoding="utf-8")
    options = ["sampling.height=32", "sampling.width=64", "sampling.num_inference_steps=1", "method.mad.steps=0",
               "sampling.guidance_scale=1", "prompts.source=prompts.txt", "trainer.accelerator=cpu",
               "monitor.wandb.mode=disabled", f"backbone.pretrained={tiny}", "output.dir=out"]  # fmt: skip
    (folder / "job.yaml").write_text("{}", encoding="utf-8")
    process = begin(("generate", "job.yaml", *options), folder, environment())
    assert process.wait() == 0, process.output()
    return folder


@pytest.fixture
def scored(one_shard, tmp_path):
    shutil.copytree(one_shard, tmp_path, dirs_exist_ok=True)
    return tmp_path / "out"


def test_filter_writes_keys(madgen_here, scored, tmp_path):
    result = madgen_here("filter", "out", "--best", "1", "--by", "seam", "--keys", "keys.txt")
    assert (result.code, result.out) == (0, "keys.txt: 2 of 2 samples\n"), result.err
    assert (tmp_path / "keys.txt").read_text(encoding="utf-8").split() == list(read(scored))


def test_seam_score_uses_the_views_of_the_last_step(job_file):
    """Three steps of views moved by 7, 3 and then 5 cells: these begin or end at cells 5, 8 and 13 of 16."""
    options = ["method.views.layout=shifted", "method.mad.steps=0", "sampling.num_inference_steps=3"]
    job = load_job([job_file], options)
    scores = PixelScores(ResolvedRun.of(job))
    image = np.random.default_rng(0).integers(0, 256, (32, 64, 3), dtype=np.uint8)
    assert scores(image)["seam"] == round(seam(image, [], [20, 32, 52], CELL), 4)
    assert scores(image)["seam"] != round(seam(image, [], [32], CELL), 4)


def test_seam_score_of_a_grid_of_views(job_file):
    job = load_job([job_file], ["method.views.stride=4", "method.mad.steps=0"])
    scores = PixelScores(ResolvedRun.of(job))
    image = np.full((48, 64, 3), 90, np.uint8)
    image[16:] = 120
    assert scores(image)["seam"] == 16.0, "of two borders, at 16 and 32 px, one has a step of 30"
    assert scores(np.ascontiguousarray(image[:32]))["seam"] == 1.0, "one view high: no border lies across it"


@pytest.fixture(scope="module")
def clip_model(tmp_path_factory):
    """Folder of a tiny random CLIP model with its processor."""
    from demo_backbone.scenes import vocabulary
    from demo_backbone.tokenizer import build_tokenizer
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip") / "model"
    tokenizer = build_tokenizer(vocabulary(), folder)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = {**sizes, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length}
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    extractor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(extractor, tokenizer).save_pretrained(folder)
    return folder


def cosine(folder, image, text):
    """Compute the cosine with transformers."""
    from transformers import CLIPModel, CLIPProcessor

    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    inputs = processor(text=[text], images=[Image.fromarray(image)], return_tensors="pt", truncation=True)
    with torch.no_grad():
        output = model(**inputs)
    return float(output.logits_per_image / model.logit_scale.detach().exp())


def test_clip_score_is_the_mean_cosine_over_squares(clip_model):
    clip = _clip.load(str(clip_model))
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (40, 100, 3), dtype=np.uint8)
    found = []
    for text in ("mountains over a meadow at noon", "the sea " * 40):
        parts = [
            cosine(clip_model, image[top:bottom, left:right], text)
            for left, top, right, bottom in covering_squares(40, 100, 40)
        ]
        assert len(parts) == 3
        found.append(np.mean([max(0, 100 * part) for part in parts]))
        assert clip_score(clip, image, text) == pytest.approx(found[-1], abs=2e-4)
    assert abs(found[0] - found[1]) > 0.01


@pytest.mark.slow
def test_clip_score_of_a_run(madgen, job_file, clip_model, tmp_path):
    model = tmp_path / "clip"
    shutil.copytree(clip_model, model)
    job = (job_file, "prompts.limit=2", f"scores.clip={model}", "scores.enabled=[coherence]")
    result = madgen("generate", *job)
    assert result.code == 0, result.err
    assert madgen("verify", "out").code == 0
    clip = _clip.load(str(model))
    made = read(tmp_path / "out")
    for image, metadata, entry in made.values():
        assert metadata["scores"] == entry["scores"]
        assert set(entry["scores"]) == {"clip", "coherence"}
        assert entry["scores"]["clip"] == pytest.approx(clip_score(clip, image, metadata["prompt"]), abs=2e-4)
    again = madgen("regenerate", "out", next(iter(made)), "-o", "again.png")
    assert (again.code, "the same pixels" in again.out) == (0, True), again.out + again.err
    identity = json.loads((tmp_path / "out/dataset.json").read_text(encoding="utf-8"))["identity"]["scores"]
    config = model / "config.json"
    config.write_text(config.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    refused = madgen("generate", *job)
    assert (refused.code, f"scores.clip: {identity['clip']} there" in refused.err) == (2, True), refused.err
    shutil.copy(clip_model / "config.json", config)
    plain = madgen("generate", job_file, "prompts.limit=2", "scores.enabled=[coherence]", "output.dir=plain")
    assert plain.code == 0, plain.err
    pictures = read(tmp_path / "plain")
    assert all(np.array_equal(image, pictures[key][0]) for key, (image, *_) in made.items())


def pickled(folder):
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def lacking_weights(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def of_another_kind(folder):
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(
        json.dumps({**content, "model_type": "siglip", "architectures": ["SiglipModel"]}), encoding="utf-8"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (pickled, "cannot load scores.clip="),
        (lacking_weights, "lacks weights: text_projection.weight"),
        (of_another_kind, "contains no CLIP model: config.json says ['SiglipModel']"),
        (lambda folder: (folder / "config.json").unlink(), "is a folder without config.json: not a CLIP model"),
        (lambda folder: (folder / "config.json").write_text("{", encoding="utf-8"), "is not valid JSON"),
    ],
)
def test_invalid_clip_model_is_an_error(clip_model, tmp_path, change, message):
    folder = tmp_path / "broken"
    shutil.copytree(clip_model, folder)
    change(folder)
    with pytest.raises(UserError) as error:
        _clip.load(str(folder))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("no-such-folder", "scores.clip='no-such-folder' is neither a folder, nor a Hub id (owner/name)"),
        ("nobody/no-such-model", "in the local Hub cache, and the Hub is not reachable"),
        (".", "is a folder without config.json: not a CLIP model"),
    ],
)
def test_missing_clip_model_is_an_error_before_anything_is_written(madgen_here, job_file, tmp_path, model, message):
    refused = madgen_here("generate", job_file, f"scores.clip={model}")
    assert (refused.code, len(refused.err.strip().splitlines())) == (2, 1), refused.err
    assert message in refused.err
    assert not (tmp_path / "out").exists()
