import numpy as np
import pytest
from demo_backbone.scenes import FARS, GROUNDS, TIMES, Scene, caption, draw, is_held_out, random_scene, vocabulary
from demo_backbone.tokenizer import build_tokenizer


def test_scene_depends_on_the_seed_only():
    scene = Scene("noon", "hills", "meadow", "low", clouds=True)
    one, same, other = (draw(scene, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert one.shape == (128, 128, 3)
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_every_attribute_renders_at_any_size():
    for time in TIMES:
        for far in FARS:
            for ground in GROUNDS:
                scene = Scene(time, far, ground, "middle", sun=True, clouds=True, stars=True, trees=True)
                image = draw(scene, np.random.default_rng(0), 32, 80)
                assert image.shape == (32, 80, 3)
                assert image.std() > 5


def test_captions_describe_subsets_of_the_scene():
    rng = np.random.default_rng(0)
    scene = Scene("night", "skyline", "sea", "low", sun=True, stars=True)
    texts = {caption(scene, rng) for _ in range(300)}
    assert len(texts) > 100
    assert not any(word in text for text in texts for word in ("clouds", "trees", "noon", "hills"))
    assert any("low horizon" in text for text in texts)
    assert not all("low horizon" in text for text in texts)
    assert caption(scene, rng, keep=0).startswith("a ")


def test_held_out_combinations_are_a_tenth_and_cover_every_value():
    scenes = [Scene(time, far, ground, "low") for time in TIMES for far in FARS for ground in GROUNDS]
    held_out = [scene for scene in scenes if is_held_out(scene)]
    assert len(held_out) == len(scenes) / 10
    assert {scene.time for scene in held_out} == set(TIMES)
    assert {scene.far for scene in held_out} == set(FARS)
    assert {scene.ground for scene in held_out} == set(GROUNDS)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return build_tokenizer(vocabulary(), tmp_path_factory.mktemp("tokenizer"))


def test_every_caption_word_is_one_token(tokenizer):
    assert [word for word in vocabulary() if len(tokenizer.tokenize(word)) != 1] == []


def test_captions_fit_the_length_and_use_known_words(tokenizer):
    rng = np.random.default_rng(0)
    for _ in range(300):
        tokens = tokenizer(caption(random_scene(rng), rng)).input_ids
        assert len(tokens) <= tokenizer.model_max_length


def test_unknown_words_are_split_into_letters(tokenizer):
    assert tokenizer.tokenize("xyz") == ["x", "y", "z</w>"]
