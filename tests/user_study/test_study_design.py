"""Choose pairs and controls of a study, and write a page that does not reveal them."""

import base64
import io
import json
import re
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image
from study_data import HOSTILE, TEXTS, make_dataset

from madgen.user_study.design import Design, choose_items, read_sources
from madgen.user_study.make import make_study
from madgen.user_study.rendering import blurred, patchwork
from madgen.utils.errors import UserError


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """Three datasets of the same four prompts, two samples each; the last one lacks a prompt and contains JPEGs."""
    root = tmp_path_factory.mktemp("datasets")
    return [
        make_dataset(root / "mad-secret", 40),
        make_dataset(root / "multi-secret", 120),
        make_dataset(root / "sync-secret", 200, TEXTS[:3], image_format="jpg"),
    ]


def blocks(page):
    """Parse the data blocks of a page as a browser delimits them: {id: JSON}."""
    found = re.findall(r'<script type="application/json" id="(\w+)">(.*?)</script', page, re.DOTALL | re.IGNORECASE)
    return {name: json.loads(text) for name, text in found}


def made(folder, datasets, **design):
    make_study(datasets, folder, Design(**design))
    return (folder / "public" / "index.html").read_text(encoding="utf-8"), json.loads(
        (folder / "key.json").read_text(encoding="utf-8")
    )


def test_pairs_show_one_sample_and_cycle_through_prompts(datasets):
    sources = read_sources(datasets)
    items = [item for item in choose_items(sources, Design(pairs=4, seed=3)) if not item.control]
    assert all(item.images[0].key == item.images[1].key == item.key for item in items)
    prompts = {}
    for item in items:
        prompts.setdefault(tuple(image.source for image in item.images), []).append(item.key[:2])
    assert prompts.keys() == {(0, 1), (0, 2), (1, 2)}
    assert sorted(prompts[0, 1]) == ["p0", "p1", "p2", "p3"]  # four prompts, one sample each
    assert Counter(prompts[0, 2]).keys() == {"p0", "p1", "p2"}


def test_all_common_pairs_are_used_if_fewer_than_requested(datasets):
    items = choose_items(read_sources(datasets), Design(pairs=100, controls=0, questions=("match", "quality")))
    assert len(items) == 2 * (8 + 6 + 6)
    assert len(set(items)) == len(items)


def test_seed_determines_the_pairs(datasets):
    sources = read_sources(datasets)
    chosen = [choose_items(sources, Design(pairs=2, controls=0, seed=seed)) for seed in (0, 0, 1, 2, 3)]
    assert chosen[0] == chosen[1]
    assert len({tuple(items) for items in chosen}) > 2


@pytest.mark.parametrize("question", ["coherence", "match", "quality", "both"])
def test_controls_have_a_right_answer(datasets, question):
    sources = read_sources(datasets)
    controls = [item for item in choose_items(sources, Design(controls=5, questions=(question,))) if item.control]
    assert len(controls) == 5
    for item in controls:
        right, wrong = item.images
        assert right.kind == "plain"
        assert right != wrong
        assert sources[right.source].samples[right.key].prompt == item.prompt
        if question == "match":
            assert sources[wrong.source].samples[wrong.key].prompt != item.prompt
        else:
            assert wrong.kind == {"quality": "blurred"}.get(question, "patchwork")


def test_page_does_not_reveal_datasets_or_controls(tmp_path, datasets):
    page, key = made(tmp_path / "study", datasets, pairs=6, questions=("match", "coherence", "quality"))
    data = blocks(page)
    shown = data.pop("study")
    for word in ("secret", "p0-0000", "fingerprint", *(dataset["fingerprint"] for dataset in key["datasets"])):
        assert word not in page
    for word in ("control", "right", "patchwork", "blurred", "plain", "key"):
        assert word not in json.dumps(shown)
    assert {frozenset(item) for item in shown["items"]} == {frozenset({"id", "question", "prompt", "pictures"})}
    assert all(item["pictures"] == sorted(item["pictures"]) for item in shown["items"])
    assert list(data) == sorted(data) == sorted(key["pictures"])
    assert {item["id"] for item in shown["items"]} == key["items"].keys()
    order = [key["pictures"][picture]["dataset"] for picture in data]
    assert order != sorted(order)
    sides = [key["pictures"][item["pictures"][0]]["dataset"] for item in shown["items"]]
    assert len(set(sides)) > 1


def test_images_are_encoded_alike_in_any_input_format(tmp_path, datasets):
    page, key = made(tmp_path / "study", datasets, pairs=3)
    for name, uri in blocks(page).items():
        if name != "study":
            data = base64.b64decode(uri.removeprefix("data:image/webp;base64,"))
            assert data[12:16] == b"VP8 "  # the simple format, without metadata
            image = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
            assert image.shape == (32, 192, 3)
            about = key["pictures"][name]
            if about["kind"] == "plain":
                assert abs(float(image[..., 2].mean()) - (40, 120, 200)[about["dataset"]]) < 12


def test_same_study_has_the_same_bytes(tmp_path, datasets):
    first, second, other = (made(tmp_path / name, datasets, seed=seed) for name, seed in (("a", 4), ("b", 4), ("c", 5)))
    assert first == second
    assert first[1]["study"] != other[1]["study"]
    assert not set(first[1]["items"]) & set(other[1]["items"])


def test_unwritable_output_exits_2_with_one_line(datasets, madgen_here):
    done = madgen_here("study", *datasets, "-o", "/proc/study")
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert done.err.startswith("madgen: -o /proc/study: ")
    assert "choose another path" in done.err


def test_hostile_prompts_are_escaped(tmp_path, datasets):
    page, _ = made(tmp_path / "study", datasets)
    assert HOSTILE in {item["prompt"] for item in blocks(page)["study"]["items"]}
    assert len(re.findall("<script", page, re.IGNORECASE)) == len(blocks(page)) + 1
    assert not re.search(r"https?://", re.sub(r'<script type="application/json".*?</script>', "", page))


def test_patchwork_contains_all_pieces_without_original_neighbours():
    images = [np.tile(np.arange(6, dtype=np.uint8).repeat(4) + 10 * at, (4, 1))[..., None] for at in range(2)]
    pieces = patchwork(images)[0, ::4, 0]
    assert sorted(pieces % 10) == list(range(6))
    assert set(pieces // 10) == {0, 1}
    assert all(abs(int(a) % 10 - int(b) % 10) != 1 for a, b in pairwise(pieces))
    assert patchwork([images[0].transpose(1, 0, 2)])[::4, 0, 0].tolist() == [1, 3, 5, 0, 2, 4]


def test_blurred_image_keeps_colours_and_loses_detail():
    noise = np.random.default_rng(0).integers(0, 255, (64, 256, 3), dtype=np.uint8)
    coarse = blurred(noise)
    assert coarse.shape == noise.shape
    assert abs(coarse.mean() - noise.mean()) < 2
    assert coarse.std() < noise.std() / 3


@pytest.mark.parametrize(
    ("others", "design", "message"),
    [
        ([], {}, "two datasets or more, got 1"),
        (["first"], {}, "the same dataset twice"),
        (["nothing"], {}, "holds no madgen dataset"),
        (["strange"], {}, "first and strange cannot be compared: no prompt id"),
        (["reworded"], {}, "first and reworded cannot be compared: different prompts with the same ids"),
        (["one"], {"questions": ("match",)}, "there is only one prompt"),
    ],
)
def test_unusable_datasets_are_refused_before_writing(tmp_path, others, design, message):
    make_dataset(tmp_path / "first", 1, TEXTS[:1] if others == ["one"] else TEXTS, samples=1)
    make_dataset(tmp_path / "one", 2, TEXTS[:1], samples=1)
    make_dataset(tmp_path / "strange", 2, ids="q", samples=1)
    make_dataset(tmp_path / "reworded", 2, [f"{text}, sharp" for text in TEXTS], samples=1)
    with pytest.raises(UserError, match=message):
        make_study([tmp_path / name for name in ("first", *others)], tmp_path / "study", Design(**design))
    assert {path.name for path in tmp_path.iterdir()} == {"first", "one", "strange", "reworded"}


def test_damaged_sample_leaves_no_files(tmp_path):
    roots = [make_dataset(tmp_path / name, 1, samples=1) for name in ("first", "second")]
    for tar in (roots[1] / "shards").glob("*.tar"):
        tar.write_bytes(bytes(tar.stat().st_size))
    with pytest.raises(UserError, match=r"checksum mismatch of sample .*; run madgen verify .*second"):
        make_study(roots, tmp_path / "study", Design())
    assert {path.name for path in tmp_path.iterdir()} == {"first", "second"}
