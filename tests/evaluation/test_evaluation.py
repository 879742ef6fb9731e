"""Evaluation of a dataset: values do not depend on batch size, shards or processes; errors name the fix."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from synthetic import PROMPTS, cut, textures

from madgen.evaluation.evaluate import Evaluation, evaluate
from madgen.evaluation.metric_columns import RankInfo, compute_columns
from madgen.evaluation.pairs import draw_pairs
from madgen.evaluation.partial_results import Column, collect
from madgen.metrics import giqa
from madgen.metrics.crops import Crops
from madgen.metrics.extractors import Extractors, parse
from madgen.utils.errors import UserError

METRICS = ("clip_score", "coherence", "fid", "kid", "giqa")


@pytest.fixture
def squares(dataset):
    return dataset("squares", textures(PROMPTS, 9, 32, 32, seed=7))


@pytest.fixture
def evaluation(networks, squares, tmp_path):
    def build(directory, **changes):
        parts = tmp_path / "parts"
        given = Evaluation(
            directory, squares, METRICS, networks, Crops(32, 0), parts / directory.root.name, parts / "ref"
        )
        return replace(given, **changes)

    return build


def numbers(report):
    return {name: [found["mean"], found["std"], found["per_prompt"]] for name, found in report["metrics"].items()}


def test_report_contains_mean_and_std_over_prompts_and_the_protocol(evaluation, dataset, panoramas):
    report = evaluate(evaluation(dataset("a", panoramas)))
    assert set(report["metrics"]) == set(METRICS)
    for name, found in report["metrics"].items():
        values = list(found["per_prompt"].values())
        assert set(found["per_prompt"]) == {"p0", "p1"}
        assert found["mean"] == pytest.approx(np.mean(values))
        assert found["std"] == pytest.approx(np.std(values))
        assert found["count"] == 10
        protocol = found["protocol"]
        assert protocol["crops"]["side_px"] == 32
        assert len(protocol["network"]["weights"]) == 32
        if name in ("fid", "kid", "giqa"):
            assert protocol["reference"] == {"fingerprint": "squares", "least": 9, "most": 9}
    json.dumps(report, allow_nan=False)


def test_values_do_not_depend_on_shards_or_their_order(evaluation, dataset, panoramas):
    first = numbers(evaluate(evaluation(dataset("a", panoramas))))
    shuffled = list(panoramas)
    random.Random(1).shuffle(shuffled)
    second = numbers(evaluate(evaluation(dataset("b", shuffled, per_shard=4))))
    for name in METRICS:
        assert first[name][0] == pytest.approx(second[name][0], rel=1e-4, abs=1e-6)
        assert first[name][2] == pytest.approx(second[name][2], rel=1e-4, abs=1e-6)


def test_values_do_not_depend_on_the_batch_size(evaluation, dataset, panoramas, tmp_path):
    directory = dataset("a", panoramas, per_shard=5)
    one = evaluate(evaluation(directory, batch=1))
    many = evaluate(evaluation(directory, batch=5, parts=tmp_path / "again", reference_parts=tmp_path / "again-too"))
    for name in METRICS:
        first, second = one["metrics"][name], many["metrics"][name]
        assert first["per_prompt"] == pytest.approx(second["per_prompt"], rel=1e-4, abs=1e-6)
        assert first["protocol_id"] == second["protocol_id"]


@pytest.mark.parametrize("world", [2, 3, 7])
def test_values_do_not_depend_on_the_number_of_processes(evaluation, dataset, panoramas, tmp_path, world):
    directory = dataset("a", panoramas)
    alone = evaluate(evaluation(directory))
    shared = evaluation(directory, parts=tmp_path / "shared", reference_parts=tmp_path / "shared-too")
    for rank in range(world - 1, 0, -1):
        assert evaluate(shared, RankInfo(rank, world)) is None
    assert evaluate(shared, RankInfo(0, world)) == alone


def test_crops_depend_on_the_key_alone(panoramas):
    crops = Crops(32, 3)
    places = {key: crops.random(key, 32, 112) for key, _, _ in panoramas}
    assert places == {key: crops.random(key, 32, 112) for key, _, _ in reversed(panoramas)}
    assert len(set(places.values())) > 5
    assert all(top == 0 and 0 <= left <= 80 for top, left in places.values())
    assert any(Crops(32, 4).random(key, 32, 112) != place for key, place in places.items())
    lefts = {crops.random(f"k{n}", 32, 40)[1] for n in range(300)}
    assert lefts == set(range(9))
    assert crops.tiles(64, 112) == [(0, 0), (0, 32), (0, 64), (32, 0), (32, 32), (32, 64)]


def test_giqa_compares_with_the_reference(evaluation, dataset, panoramas, squares):
    """GIQA is not symmetric, so it detects swapped sides."""
    directory = dataset("a", panoramas)
    report = evaluate(evaluation(directory))
    column = evaluation(directory).columns["giqa"]
    own, theirs = (
        collect(d, column, evaluation(directory).parts.parent / n) for d, n in ((directory, "a"), (squares, "ref"))
    )
    expected = giqa.distance(own.values[:5], theirs.values[:9])
    assert report["metrics"]["giqa"]["per_prompt"]["p0"] == pytest.approx(expected)
    assert theirs.keys[:2] == ["p0-0000", "p0-0001"]
    assert len(theirs.keys) == 18


def test_interrupted_pass_resumes(dataset, panoramas, tmp_path):
    directory, seen = dataset("a", panoramas), []

    def compute(images):
        seen.extend(image.key for image in images)
        if len(seen) == 7 and not stopped:
            stopped.append(True)
            raise KeyboardInterrupt
        return np.array([len(image.key) for image in images])

    stopped = []
    column = Column("lengths", {}, compute)
    with pytest.raises(KeyboardInterrupt):
        compute_columns(directory, [column], tmp_path / "parts", Crops(32), 1, RankInfo())
    assert compute_columns(directory, [column], tmp_path / "parts", Crops(32), 1, RankInfo())
    assert seen == [key for key, _, _ in panoramas[:7]] + [key for key, _, _ in panoramas[6:]]
    assert compute_columns(directory, [column], tmp_path / "parts", Crops(32), 1, RankInfo())
    assert len(seen) == 11  # nothing is computed twice


def test_regenerated_shard_is_evaluated_again(evaluation, dataset, panoramas, tmp_path):
    import shutil

    directory = dataset("a", panoramas)
    first = evaluate(evaluation(directory))
    other = textures(PROMPTS, 5, 32, 112, seed=5)
    shutil.rmtree(directory.root)
    changed = evaluate(evaluation(dataset("a", [*panoramas[:9], other[9]])))
    assert first["metrics"]["fid"]["per_prompt"]["p0"] == changed["metrics"]["fid"]["per_prompt"]["p0"]
    assert first["metrics"]["fid"]["per_prompt"]["p1"] != changed["metrics"]["fid"]["per_prompt"]["p1"]


def test_halves_replace_the_reference(evaluation, dataset):
    made = dataset("squares-too", textures(PROMPTS, 18, 32, 32, seed=3))
    report = evaluate(evaluation(made, reference=None, halves=True, metrics=("fid", "kid", "giqa")))
    assert report["metrics"]["fid"]["protocol"]["reference"] == {"kind": "halves", "seed": 0}
    assert abs(report["metrics"]["kid"]["mean"]) < 0.05
    assert report["metrics"]["fid"]["mean"] > 0


def test_halves_compare_random_pairs_of_images(evaluation, dataset, networks):
    made = dataset("squares-too", textures(PROMPTS, 5, 32, 40, seed=3))
    every = [draw_pairs([f"p0-000{n}" for n in range(5)], count, 0) for count in (10, 1000, 4)]
    assert len(set(every[0])) == 10
    assert every[0] == every[1]
    assert len(set(every[2])) == 4
    assert all(first < second for first, second in every[0])
    request = evaluation(made, reference=None, halves=True, metrics=("coherence",), pairs=4)
    report = evaluate(request)
    found = report["metrics"]["coherence"]
    images = {image.key: image for image in cut(textures(PROMPTS, 5, 32, 40, seed=3))}
    expected = []
    for first, second in every[2]:
        features = networks["clip"].net.features([images[first].crop, images[second].crop])
        expected.append(float(torch.nn.functional.cosine_similarity(*features[:, None])))
    assert found["per_prompt"]["p0"] == pytest.approx(np.mean(expected), rel=1e-5)
    assert found["protocol"]["pictures"] == {"pairs": 4}
    assert evaluate(request) == report  # from cached pairs


def test_pool_dataset_gives_one_score_without_std(evaluation, dataset, panoramas):
    report = evaluate(evaluation(dataset("a", panoramas), pool="dataset"))
    assert report["metrics"]["fid"]["std"] is None
    assert report["metrics"]["fid"]["per_prompt"] == {}
    assert report["metrics"]["fid"]["protocol"]["reference"]["least"] == 18


def test_too_few_or_too_small_images_are_refused(evaluation, dataset, panoramas, squares):
    few = dataset("few", [panoramas[0], panoramas[5]])
    with pytest.raises(UserError, match=r"fid, kid, giqa need at least 2 images per prompt, got 1.*--pool dataset"):
        evaluate(evaluation(few))
    with pytest.raises(UserError, match=r"fid needs at least 2 images per prompt in the reference, got 1"):
        evaluate(evaluation(squares, reference=few, metrics=("fid",)))
    with pytest.raises(UserError, match="giqa needs at least 8 images per prompt in the reference, got 5"):
        evaluate(evaluation(squares, reference=dataset("five", panoramas), metrics=("giqa",)))
    with pytest.raises(UserError, match="has no images of the prompt 'a lake'"):
        evaluate(evaluation(dataset("other", textures(["x", "y", "a lake"], 2, 32, 64))))
    with pytest.raises(UserError, match=r"32x112 px, too small for crops of 64 px \(--crop\)"):
        evaluate(evaluation(dataset("small", panoramas), crops=Crops(64), metrics=("clip_score",)))


def test_extractor_selects_networks_by_role(clip_folder, tmp_path):
    assert parse("demo") == {"clip": "demo", "features": "demo", "vgg": "random", "dinov2": "none"}
    assert parse("paper,features=demo")["features"] == "demo"
    assert parse(f"{clip_folder},vgg=random")["clip"] == str(clip_folder)
    for text, message in {
        "papr": "neither paper, demo",
        "demo,clop=x": "unknown role 'clop'; known: clip, features",
        "clip=x": "no network for features, vgg, dinov2",
        "demo,vgg=alex": "must be imagenet or random",
    }.items():
        with pytest.raises(UserError, match=message):
            parse(text)
    with pytest.raises(UserError, match="no network for dinov2"):
        Extractors(parse("demo"), torch.device("cpu"))["dinov2"]


def test_missing_weights_error_names_file_folder_and_alternative(monkeypatch, tmp_path):
    from urllib.error import URLError

    def refuse(*_, **__):
        raise URLError("no route")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    networks = Extractors(parse("paper"), torch.device("cpu"))
    for role, message in {
        "features": r"weights-inception-2015-12-05-6726825d.pth into .*checkpoints.*--extractor demo",
        "lpips": r"intra_lpips needs torchvision's VGG16 weights.*vgg=random",
        "style": r"intra_style needs torchvision's VGG19 weights.*vgg=random",
        "clip": r"--extractor clip='openai/clip-vit-base-patch16'.*is not reachable",
        "dinov2": r"--extractor dinov2='facebook/dinov2-large'.*is not reachable",
    }.items():
        with pytest.raises(UserError, match=message):
            networks[role]
