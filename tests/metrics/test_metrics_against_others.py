"""Compare every metric with an independent implementation on the same random weights."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from sklearn.metrics.pairwise import cosine_similarity, polynomial_kernel
from sklearn.neighbors import NearestNeighbors
from synthetic import PROMPTS, cut, textures

from madgen.metrics import METRICS, clip_iqa, clip_score, coherence, fid, giqa, intra_lpips, intra_style, kid, metric
from madgen.metrics.crops import CroppedImage, Crops

CLOSE = {"rel": 1e-4, "abs": 1e-7}


def as_tensor(images):
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


@pytest.fixture
def transformers_4(monkeypatch):
    """Let CLIP return tensors, as in transformers 4: torchmetrics 1.9 expects them."""
    from transformers import CLIPModel

    for name in ("get_image_features", "get_text_features"):
        method = getattr(CLIPModel, name)
        as_tensor = lambda self, *args, _method=method, **kwargs: _method(self, *args, **kwargs).pooler_output  # noqa: E731
        monkeypatch.setattr(CLIPModel, name, as_tensor)


@pytest.mark.usefixtures("transformers_4")
def test_clip_score_matches_torchmetrics(images, networks, clip_folder):
    from torchmetrics.functional.multimodal import clip_score as foreign

    scores = clip_score.score(images, networks["clip"])
    for image, value in zip(images, scores, strict=True):
        expected = foreign(as_tensor([image.crop])[0], image.prompt, model_name_or_path=str(clip_folder))
        assert value == pytest.approx(max(float(expected), 0.0), **CLOSE)
    assert len(set(scores)) == len(scores)


@pytest.mark.usefixtures("transformers_4")
def test_clip_iqa_matches_torchmetrics(networks, clip_folder):
    """Use crops of the network's input size: torchmetrics resizes floats, CLIP's processor resizes uint8."""
    from torchmetrics.functional.multimodal import clip_image_quality_assessment as foreign

    images = cut(textures(PROMPTS, 3, 64, 64), 64)
    expected = foreign(
        as_tensor([image.crop for image in images]), model_name_or_path=str(clip_folder), data_range=1
    )  # the processor divides by 255
    assert clip_iqa.score(images, networks["clip"]) == pytest.approx(expected.tolist(), **CLOSE)


def test_coherence_matches_scikit_learn_cosine_similarity(images, networks):
    for image, value in zip(images, coherence.score(images, networks["clip"]), strict=True):
        features = networks["clip"].net.features(image.tiles).numpy()
        assert value == pytest.approx(cosine_similarity(features)[np.triu_indices(3, 1)].mean(), **CLOSE)


@pytest.mark.slow
def test_intra_lpips_matches_the_lpips_package(images, networks):
    import lpips

    net = networks["lpips"].net
    foreign = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    foreign.net.load_state_dict(net.net.state_dict())
    for image, value in zip(images[:3], intra_lpips.score(images[:3], networks["lpips"]), strict=True):
        first, second, third = as_tensor(image.tiles).float()[:, None] / 255
        with torch.no_grad():
            pairs = [
                foreign(a, b, normalize=True).item() for a, b in ((first, second), (first, third), (second, third))
            ]
        assert value == pytest.approx(np.mean(pairs), **CLOSE)
        assert value > 0


def test_intra_style_matches_gram_matrices_of_extracted_features(images, networks):
    from torchvision.models.feature_extraction import create_feature_extractor

    net = networks["style"].net
    nodes = create_feature_extractor(net, {str(at): f"conv{n}" for n, at in enumerate(intra_style.LAYERS, 1)})
    image = images[0]
    pixels = as_tensor(image.tiles).double() / 255
    normalized = (pixels - torch.tensor(intra_style.MEAN)[:, None, None]) / torch.tensor(intra_style.STD)[:, None, None]
    total = []
    with torch.no_grad():
        features = nodes.double()(normalized)
    net.float()
    for first, second in ((0, 1), (0, 2), (1, 2)):
        losses = []
        for name in ("conv1", "conv2", "conv3", "conv4", "conv5"):
            _, channels, height, width = features[name].shape
            grams = torch.einsum("nchw,ndhw->ncd", features[name], features[name]) / (channels * height * width)
            losses.append(float(torch.nn.functional.mse_loss(grams[first], grams[second])))
        total.append(sum(losses))
    assert intra_style.score([image], networks["style"])[0] == pytest.approx(np.mean(total), rel=1e-4)


def test_intra_metrics_of_a_single_crop_are_nan(networks, panoramas):
    key, prompt, image = panoramas[0]
    square = [CroppedImage(key, prompt, image[:, :32], Crops(32))]
    for module, role in ((intra_lpips, "lpips"), (intra_style, "style"), (coherence, "clip")):
        assert math.isnan(module.score(square, networks[role])[0])


def gaussians(count, other, width, seed=0):
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(width, width)) / np.sqrt(width)
    return rng.normal(size=(count, width)) @ mix, rng.normal(0.3, 1.5, size=(other, width))


@pytest.mark.parametrize(("count", "other", "width"), [(40, 60, 12), (9, 7, 24), (30, 8, 16)])
def test_fid_matches_scipy_matrix_root(count, other, width):
    """Include fewer images than features, where the covariance is singular."""
    first, second = gaussians(count, other, width)
    covariances = [np.cov(features, rowvar=False) for features in (first, second)]
    root = sqrtm(covariances[0] @ covariances[1])
    means = np.square(first.mean(axis=0) - second.mean(axis=0)).sum()
    expected = means + np.trace(covariances[0] + covariances[1] - 2 * root.real)
    assert fid.distance(first, second) == pytest.approx(expected, rel=1e-4)


class Identity(torch.nn.Module):
    """Pass features through in place of images."""

    num_features = 12

    def forward(self, features):
        return features


def test_fid_matches_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance

    first, second = gaussians(40, 60, 12)
    foreign = FrechetInceptionDistance(feature=Identity()).set_dtype(torch.float64)
    foreign.update(torch.from_numpy(second), real=True)
    foreign.update(torch.from_numpy(first), real=False)
    assert fid.distance(first, second) == pytest.approx(float(foreign.compute()), rel=1e-4)


def test_fid_of_gaussians_with_known_distance():
    """Axis-aligned with exact moments: |m - m'|² + sum (s - s')²."""
    axes = np.vstack([np.diag([1.0, 2.0, 3.0]), -np.diag([1.0, 2.0, 3.0])]) * np.sqrt(2.5)
    assert np.cov(axes, rowvar=False) == pytest.approx(np.diag([1.0, 4.0, 9.0]))
    assert fid.distance(axes, 2 * axes + 1) == pytest.approx(3 + 1 + 4 + 9)
    assert fid.distance(axes, axes) == pytest.approx(0, abs=1e-9)


def test_kid_matches_torchmetrics():
    from torchmetrics.image.kid import KernelInceptionDistance

    first, second = gaussians(30, 30, 12)
    foreign = KernelInceptionDistance(feature=Identity(), subsets=2, subset_size=30).set_dtype(torch.float64)
    foreign.update(torch.from_numpy(second), real=True)
    foreign.update(torch.from_numpy(first), real=False)
    assert kid.distance(first, second) == pytest.approx(float(foreign.compute()[0]), rel=1e-4)


def test_kid_of_unequal_counts_matches_scikit_learn(monkeypatch):
    monkeypatch.setattr(kid, "ROWS", 7)
    first, second = gaussians(20, 33, 12)
    kernels = [
        polynomial_kernel(a, b, degree=3, coef0=1) for a, b in ((first, first), (second, second), (first, second))
    ]
    within = [(kernel.sum() - np.trace(kernel)) / (len(kernel) * (len(kernel) - 1)) for kernel in kernels[:2]]
    assert kid.distance(first, second) == pytest.approx(sum(within) - 2 * kernels[2].mean(), rel=1e-9)


def test_giqa_matches_scikit_learn_neighbours(monkeypatch):
    monkeypatch.setattr(giqa, "ROWS", 3)
    first, second = gaussians(11, 40, 12)
    apart, _ = NearestNeighbors(n_neighbors=8, metric="manhattan").fit(second).kneighbors(first)
    assert giqa.distance(first, second) == pytest.approx((1 / apart).sum(axis=1).mean(), rel=1e-9)


def test_giqa_searches_neighbours_in_the_reference():
    """Crops at 0, eight reference images at 2 and one at 100 give 8 / 2; swapped, less."""
    crops, reference = np.zeros((8, 1)), np.array([[2.0]] * 8 + [[100.0]])
    assert giqa.distance(crops, reference) == pytest.approx(4.0)
    assert giqa.distance(reference, crops) == pytest.approx((8 * 4.0 + 8 / 100) / 9)


def test_every_metric_defines_its_protocol():
    for name in METRICS:
        module = metric(name)
        assert module.LABEL
        assert len(module.DEFINITION) > 20
        assert hasattr(module, "distance") != hasattr(module, "score")
        assert (1000 if name in ("intra_style", "kid", "giqa") else 1) == module.SCALE
