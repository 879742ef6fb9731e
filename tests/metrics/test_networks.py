"""Load the paper's networks from random weights in their real file layouts, and compare features."""

import numpy as np
import pytest
import torch

from madgen.metrics.extractors import Extractors, parse
from madgen.utils.errors import UserError


@pytest.fixture(scope="module")
def images():
    return list(np.random.default_rng(0).integers(0, 256, (2, 48, 48, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory):
    """Random weights in the file format of torch-fidelity's download."""
    from torch_fidelity import feature_extractor_inceptionv3 as port

    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(port, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(port.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        torch.manual_seed(0)
        torch.save(port.FeatureExtractorInceptionV3("random", ["2048"]).state_dict(), path)
    return path


def test_inception_matches_torchmetrics(images, inception_weights):
    from torchmetrics.image.fid import NoTrainInceptionV3

    network = Extractors(parse(f"demo,features={inception_weights}"), torch.device("cpu"))["features"]
    foreign = NoTrainInceptionV3("random", ["2048"], str(inception_weights), antialias=False)
    expected = foreign(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))
    assert network.net.features(images).numpy() == pytest.approx(expected.numpy(), rel=1e-4, abs=1e-6)
    assert network.label == "Inception"


def test_inception_weights_with_pickled_code_are_refused(tmp_path):
    import pickle

    class Code:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    (tmp_path / "bad.pth").write_bytes(pickle.dumps({"weights": Code()}))
    with pytest.raises(UserError, match="contains no Inception weights"):
        Extractors(parse(f"demo,features={tmp_path / 'bad.pth'}"), torch.device("cpu"))["features"]
    assert not (tmp_path / "ran").exists()


def test_dinov2_matches_the_transformers_processor_and_model(images, tmp_path):
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56}
    model = Dinov2Model(Dinov2Config(**sizes)).eval()
    model.save_pretrained(tmp_path / "dino")
    processor = BitImageProcessor(
        size={"height": 224, "width": 224}, resample=3, do_center_crop=False,
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    )  # fmt: skip
    from PIL import Image

    resized = [Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC) for image in images]
    with torch.no_grad():
        expected = model(**processor(images=resized, do_resize=False, return_tensors="pt")).last_hidden_state[:, 0]
    network = Extractors(parse(f"demo,dinov2={tmp_path / 'dino'}"), torch.device("cpu"))["dinov2"]
    assert network.net.features(images).numpy() == pytest.approx(expected.numpy(), rel=1e-4, abs=1e-5)


def test_weights_hash_distinguishes_networks(clip_folder, tmp_path):
    from transformers import CLIPModel, CLIPProcessor

    device = torch.device("cpu")
    first = Extractors(parse(f"{clip_folder},vgg=random"), device)["clip"]
    assert first.weights == Extractors(parse(f"{clip_folder},vgg=random"), device)["clip"].weights
    model = CLIPModel.from_pretrained(clip_folder)
    with torch.no_grad():
        model.visual_projection.weight[0, 0] += 1
    model.save_pretrained(tmp_path / "other")
    CLIPProcessor.from_pretrained(clip_folder).save_pretrained(tmp_path / "other")
    assert first.weights != Extractors(parse(f"{tmp_path / 'other'},vgg=random"), device)["clip"].weights


@pytest.mark.slow
def test_fetch_downloads_the_networks_of_evaluate(clip_folder, capsys):
    from madgen.generation.fetch import fetch_networks

    fetch_networks(f"{clip_folder},vgg=random")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        f"--extractor {role}" for role in ("clip", "features", "lpips", "style")
    ]
    assert "untrained VGG16" in lines[2]
    with pytest.raises(UserError, match="--extractor papers: neither paper, demo"):
        fetch_networks("papers")
