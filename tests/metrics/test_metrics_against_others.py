"""Every metric against a foreign implementation over the same random weights."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from sklearn.metrics.pairwise import cosine_similarity, polynomial_kernel
from sklearn.neighbors import NearestNeighbors
from synthetic import PROMPTS, cut, textures

from madgen.metrics import METRICS, clip_iqa, clip_score, coherence, fid, giqa, intra_lpips, intra_style, kid, metric
from madgen.metrics.crops import Crops, Picture

CLOSE = {"rel": 1e-4, "abs": 1e-7}


def as_tensor(images):
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


@pytest.fixture
def transformers_4(monkeypatch):
    """torchmetrics 1.9 expects tensors, as transformers 4 gave them."""
    from transformers import CLIPModel

    for name in ("get_image_features", "get_text_features"):
        method = getattr(CLIPModel, name)
        as_tensor = lambda self, *args, _method=method, **kwargs: _method(self, *args, **kwargs).pooler_output  # noqa: E731
        monkeypatch.setattr(CLIPModel, name, as_tensor)


@pytest.mark.usefixtures("transformers_4")
def test_clip_score_is_torchmetrics(pictures, networks, clip_folder):
    from torchmetrics.functional.multimodal import clip_score as foreign

    found = clip_score.score(pictures, networks["clip"])
    for picture, value in zip(pictures, found, strict=True):
        expected = foreign(as_tensor([picture.crop])[0], picture.prompt, model_name_or_path=str(clip_folder))
        assert value == pytest.approx(max(float(expected), 0.0), **CLOSE)
    assert len(set(found)) == len(found)


@pytest.mark.usefixtures("transformers_4")
def test_clip_iqa_is_torchmetrics(networks, clip_folder):
    """At the network's own size: torchmetrics would resize in floats, CLIP's processor does so in whole levels."""
    from torchmetrics.functional.multimodal import clip_image_quality_assessment as foreign

    pictures = cut(textures(PROMPTS, 3, 64, 64), 64)
    images = as_tensor([picture.crop for picture in pictures])
    expected = foreign(images, model_name_or_path=str(clip_folder), data_range=1)  # the processor divides by 255
    assert clip_iqa.score(pictures, networks["clip"]) == pytest.approx(expected.tolist(), **CLOSE)


def test_coherence_is_the_cosine_of_crops(pictures, networks):
    for picture, value in zip(pictures, coherence.score(pictures, networks["clip"]), strict=True):
        features = networks["clip"].image_features(picture.tiles).numpy()
        assert value == pytest.approx(cosine_similarity(features)[np.triu_indices(3, 1)].mean(), **CLOSE)


def test_intra_lpips_is_the_lpips_package(pictures, networks):
    import lpips

    net = networks["lpips"].net
    foreign = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    foreign.net.load_state_dict(net.net.state_dict())
    for picture, value in zip(pictures[:3], intra_lpips.score(pictures[:3], networks["lpips"]), strict=True):
        first, second, third = as_tensor(picture.tiles).float()[:, None] / 255
        with torch.no_grad():
            pairs = [
                foreign(a, b, normalize=True).item() for a, b in ((first, second), (first, third), (second, third))
            ]
        assert value == pytest.approx(np.mean(pairs), **CLOSE)
        assert value > 0


def test_intra_style_is_the_textbook_s(pictures, networks):
    from torchvision.models.feature_extraction import create_feature_extractor

    net = networks["style"].net
    nodes = create_feature_extractor(net, {str(at): f"conv{n}" for n, at in enumerate(intra_style.LAYERS, 1)})
    picture = pictures[0]
    pixels = as_tensor(picture.tiles).double() / 255
    seen = (pixels - torch.tensor(intra_style.MEAN)[:, None, None]) / torch.tensor(intra_style.STD)[:, None, None]
    total = []
    with torch.no_grad():
        features = nodes.double()(seen)
    net.float()
    for first, second in ((0, 1), (0, 2), (1, 2)):
        losses = []
        for name in ("conv1", "conv2", "conv3", "conv4", "conv5"):
            _, channels, height, width = features[name].shape
            grams = torch.einsum("nchw,ndhw->ncd", features[name], features[name]) / (channels * height * width)
            losses.append(float(torch.nn.functional.mse_loss(grams[first], grams[second])))
        total.append(sum(losses))
    assert intra_style.score([picture], networks["style"])[0] == pytest.approx(np.mean(total), rel=1e-4)


def test_a_picture_of_one_crop_has_no_pairs(networks, panoramas):
    key, prompt, image = panoramas[0]
    square = [Picture(key, prompt, image[:, :32], Crops(32))]
    for module, role in ((intra_lpips, "lpips"), (intra_style, "style"), (coherence, "clip")):
        assert math.isnan(module.score(square, networks[role])[0])


def gaussians(count, other, width, seed=0):
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(width, width)) / np.sqrt(width)
    return rng.normal(size=(count, width)) @ mix, rng.normal(0.3, 1.5, size=(other, width))


@pytest.mark.parametrize(("count", "other", "width"), [(40, 60, 12), (9, 7, 24), (30, 8, 16)])
def test_fid_is_clean_fid_s_formula(count, other, width):
    """Also with fewer pictures than features, where the covariance is singular."""
    first, second = gaussians(count, other, width)
    covariances = [np.cov(features, rowvar=False) for features in (first, second)]
    root = sqrtm(covariances[0] @ covariances[1])
    means = np.square(first.mean(axis=0) - second.mean(axis=0)).sum()
    expected = means + np.trace(covariances[0] + covariances[1] - 2 * root.real)
    assert fid.distance(first, second) == pytest.approx(expected, rel=1e-4)


class AsTheyAre(torch.nn.Module):
    """Features in place of pictures."""

    num_features = 12

    def forward(self, features):
        return features


def test_fid_is_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance

    first, second = gaussians(40, 60, 12)
    foreign = FrechetInceptionDistance(feature=AsTheyAre()).set_dtype(torch.float64)
    foreign.update(torch.from_numpy(second), real=True)
    foreign.update(torch.from_numpy(first), real=False)
    assert fid.distance(first, second) == pytest.approx(float(foreign.compute()), rel=1e-4)


def test_fid_of_known_gaussians():
    """Axis-parallel, of exact moments: |m - m'|² + sum (s - s')²."""
    axes = np.vstack([np.diag([1.0, 2.0, 3.0]), -np.diag([1.0, 2.0, 3.0])]) * np.sqrt(2.5)
    assert np.cov(axes, rowvar=False) == pytest.approx(np.diag([1.0, 4.0, 9.0]))
    assert fid.distance(axes, 2 * axes + 1) == pytest.approx(3 + 1 + 4 + 9)
    assert fid.distance(axes, axes) == pytest.approx(0, abs=1e-9)


def test_kid_is_torchmetrics():
    from torchmetrics.image.kid import KernelInceptionDistance

    first, second = gaussians(30, 30, 12)
    foreign = KernelInceptionDistance(feature=AsTheyAre(), subsets=2, subset_size=30).set_dtype(torch.float64)
    foreign.update(torch.from_numpy(second), real=True)
    foreign.update(torch.from_numpy(first), real=False)
    assert kid.distance(first, second) == pytest.approx(float(foreign.compute()[0]), rel=1e-4)


def test_kid_of_unequal_numbers_by_scikit_learn(monkeypatch):
    monkeypatch.setattr(kid, "ROWS", 7)
    first, second = gaussians(20, 33, 12)
    kernels = [
        polynomial_kernel(a, b, degree=3, coef0=1) for a, b in ((first, first), (second, second), (first, second))
    ]
    within = [(kernel.sum() - np.trace(kernel)) / (len(kernel) * (len(kernel) - 1)) for kernel in kernels[:2]]
    assert kid.distance(first, second) == pytest.approx(sum(within) - 2 * kernels[2].mean(), rel=1e-9)


def test_giqa_is_scikit_learn_s_neighbours(monkeypatch):
    monkeypatch.setattr(giqa, "ROWS", 3)
    first, second = gaussians(11, 40, 12)
    apart, _ = NearestNeighbors(n_neighbors=8, metric="manhattan").fit(second).kneighbors(first)
    assert giqa.distance(first, second) == pytest.approx((1 / apart).sum(axis=1).mean(), rel=1e-9)


def test_giqa_asks_for_the_nearest_of_the_reference():
    """One crop at 0, eight pictures of the reference at 2 and one far away: 8 / 2; the other way round less."""
    crops, reference = np.zeros((8, 1)), np.array([[2.0]] * 8 + [[100.0]])
    assert giqa.distance(crops, reference) == pytest.approx(4.0)
    assert giqa.distance(reference, crops) == pytest.approx((8 * 4.0 + 8 / 100) / 9)


def test_every_metric_says_what_it_is():
    for name in METRICS:
        module = metric(name)
        assert module.LABEL
        assert len(module.DEFINITION) > 20
        assert hasattr(module, "distance") != hasattr(module, "score")
        assert (1000 if name in ("intra_style", "kid", "giqa") else 1) == module.SCALE
