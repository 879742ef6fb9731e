"""`method.noise.blend`: controlled variations of a panorama by the noise of a second seed."""

import json
import math
import tarfile

import pytest
import torch
from PIL import Image
from plans import tasks_of

from madgen import PanoramaSampler, load_job
from madgen.dataset import manifest
from madgen.dataset.plan import build_plan
from madgen.diffusion.noise import align, blend, slerp
from madgen.types import NoiseBlend
from madgen.utils.errors import UserError


def noise_of(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_hand(start, end, share):
    """Shoemake's formula, in Python's floats."""
    a, b = start.double().flatten().tolist(), end.double().flatten().tolist()
    cosine = math.fsum(x * y for x, y in zip(a, b, strict=True))
    cosine /= math.sqrt(math.fsum(x * x for x in a) * math.fsum(y * y for y in b))
    angle = math.acos(cosine)
    first, second = (math.sin(part * angle) / math.sin(angle) for part in (1 - share, share))
    return torch.tensor([first * x + second * y for x, y in zip(a, b, strict=True)]).view(start.shape)


def angle(one, other):
    return float(torch.cosine_similarity(one.double().flatten(), other.double().flatten(), dim=0).acos())


def sampler_of(tiny, *overrides, **options):
    options = {"mad_steps": 1, "dtype": "float32", **options}
    return PanoramaSampler.from_pretrained(
        str(tiny), overrides=[f"method.noise.{each}" for each in overrides], **options
    )


def sample(sampler, seeds=(7,), **options):
    size = {"height": 32, "width": 64, "num_inference_steps": 2, "guidance_scale": 2.0, "output": "latent"}
    return sampler.sample(["a hill"] * len(seeds), seeds=seeds, **{**size, **options})


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_blended_noise_is_unit_noise_on_the_arc_between_both(share):
    start, end = noise_of(1, 1, 4, 64, 96), noise_of(2, 1, 4, 64, 96)
    mixed = slerp(start, end, share)
    torch.testing.assert_close(mixed, by_hand(start, end, share), rtol=1e-6, atol=1e-6)
    assert float(mixed.var()) == pytest.approx(1, abs=0.03)
    assert abs(float(mixed.mean())) < 0.03
    between, to_start, to_end = angle(start, end), angle(mixed, start), angle(mixed, end)
    assert to_start == pytest.approx(share * between, rel=0.01), "their lengths differ by less"
    assert to_end == pytest.approx((1 - share) * between, rel=0.01)


def test_variance_is_kept_in_every_cell():
    start, end = noise_of(1, 4000, 1, 2, 3), noise_of(2, 4000, 1, 2, 3)
    mean = (start + end) / 2
    mixed = slerp(start[None, :, 0], end[None, :, 0], 0.5)[0]
    assert torch.allclose(mixed.var(0), torch.ones(2, 3), atol=0.1)
    assert float(mean.var()) < 0.6, "plain averaging would halve it"


def test_ends_and_equal_noise_are_exact():
    start, end = noise_of(1, 2, 4, 8, 16), noise_of(2, 2, 4, 8, 16)
    assert torch.equal(blend(start, end, [0.0, 1.0]), torch.cat([start[:1], end[1:]]))
    assert torch.equal(blend(start, start, [0.3, 0.8]), start)


def test_each_panorama_has_its_share_whatever_the_batch():
    start, end = noise_of(1, 3, 4, 8, 16), noise_of(2, 3, 4, 8, 16)
    shares = [0.2, 0.0, 0.7]
    together = blend(start, end, shares)
    for index, share in enumerate(shares):
        assert torch.equal(together[index : index + 1], slerp(start[[index]], end[[index]], share))


def test_share_of_0_is_the_sample_and_share_of_1_the_second_seed(tiny):
    plain = sampler_of(tiny)
    own, second = sample(plain), sample(plain, seeds=[5])
    assert torch.equal(sample(sampler_of(tiny, "blend={seed: 5, share: 0}")), own)
    assert torch.equal(sample(sampler_of(tiny, "blend={seed: 5, share: 1}")), second)
    halfway = sample(sampler_of(tiny, "blend={seed: 5, share: 0.5}"))
    assert not torch.equal(halfway, own)
    assert not torch.equal(halfway, second)


def test_latents_are_those_of_the_interpolated_noise(tiny):
    mixed = by_hand(noise_of(7, 1, 4, 8, 16), noise_of(5, 1, 4, 8, 16), 0.25)
    options = {"height": 32, "width": 64, "num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "latent"}
    expected = sampler_of(tiny)("a hill", latents=mixed, **options).images
    ours = sample(sampler_of(tiny, "blend={seed: 5, share: 0.25}"))
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_variations_are_nearer_to_the_panorama_the_larger_the_share(tiny):
    shares = [1.0, 0.95, 0.8, 0.0]
    images = sample(sampler_of(tiny, f"blend={{seed: 5, share: {shares}}}"), seeds=[1, 2, 3, 4])
    distances = [float((image - images[0]).norm()) for image in images]
    assert distances == sorted(distances)
    assert len(set(distances)) == 4


def test_second_seed_defaults_to_that_of_the_first_panorama(tiny):
    ours = sample(sampler_of(tiny, "blend.share=0.6"), seeds=[3, 4, 5])
    given = sample(sampler_of(tiny, "blend={seed: 3, share: 0.6}"), seeds=[3, 4, 5])
    assert torch.equal(ours, given)
    plain = sample(sampler_of(tiny), seeds=[3, 4, 5])
    assert torch.equal(ours[0], plain[0])
    assert not torch.equal(ours[1], plain[1])


@pytest.mark.parametrize("options", [{"loop": True}, {"height": 48, "width": 48}], ids=str)
def test_blend_combines_with_alignment_loops_and_grids(tiny, options):
    aligned = sampler_of(tiny, "align=0.4")
    own, second = (sample(aligned, seeds=[seed], **options) for seed in (7, 5))
    assert torch.equal(sample(sampler_of(tiny, "align=0.4", "blend={seed: 5, share: 1}"), **options), second)
    size = options.get("height", 32) // 4, options.get("width", 64) // 4
    first, other = (torch.Generator().manual_seed(seed) for seed in (7, 5))
    (noise, view), (noise_2, view_2) = (
        [torch.randn(1, 4, *shape, generator=each) for shape in (size, (8, 8))] for each in (first, other)
    )
    mixed = align(by_hand(noise, noise_2, 0.3), by_hand(view, view_2, 0.3), 0.4)
    call = {"height": 32, "width": 64, "num_inference_steps": 2, "guidance_scale": 2.0, **options}
    expected = sampler_of(tiny)("a hill", latents=mixed, output_type="latent", **call).images
    ours = sample(sampler_of(tiny, "align=0.4", "blend={seed: 5, share: 0.3}"), **options)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(ours, own)


def test_blend_combines_with_the_reference_view_and_ancestral_noise(tiny):
    reference = ["merge={operator: swap, reference_steps: 1}"]
    overrides = [f"method.{each}" for each in reference]
    options = {"mad_steps": 0, "dtype": "float32", "stride": 6}
    plain = PanoramaSampler.from_pretrained(str(tiny), overrides=overrides, **options)
    other = PanoramaSampler.from_pretrained(
        str(tiny), overrides=[*overrides, "method.noise.blend={seed: 5, share: 1}"], **options
    )
    assert torch.equal(sample(other, width=80), sample(plain, seeds=[5], width=80))
    ancestral = {"scheduler": "EulerAncestralDiscreteScheduler"}
    ours = sample(sampler_of(tiny, "blend={seed: 5, share: 1}", **ancestral))
    assert not torch.equal(ours, sample(sampler_of(tiny, **ancestral), seeds=[5])), "later noise is the sample's"


def test_generators_need_an_explicit_second_seed(tiny):
    options = {"height": 32, "width": 64, "num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "latent"}
    called = sampler_of(tiny, "blend={seed: 5, share: 0.5}")(
        "a hill", generator=torch.Generator().manual_seed(7), **options
    )
    assert torch.equal(called.images, sample(sampler_of(tiny, "blend={seed: 5, share: 0.5}")))
    with pytest.raises(UserError, match=r"method\.noise\.blend\.seed must be set in this call"):
        sampler_of(tiny, "blend.share=0.5")("a hill", generator=torch.Generator().manual_seed(7), **options)


REFUSED = [
    ("{seed: 5, share: 1.5}", "method.noise.blend.share must be in 0..1, or a list of such numbers, got 1.5"),
    ("{seed: 5, share: -0.1}", "method.noise.blend.share must be in 0..1, or a list of such numbers, got -0.1"),
    ("{seed: 5, share: .nan}", "method.noise.blend.share must be in 0..1, or a list of such numbers, got nan"),
    ("{seed: 5, share: true}", "method.noise.blend.share must be in 0..1, or a list of such numbers, got True"),
    ("{seed: 5, share: half}", "method.noise.blend.share must be in 0..1, or a list of such numbers, got 'half'"),
    ("{seed: 5, share: [0.1, null]}", "method.noise.blend.share must be in 0..1, or a list of such numbers, got null"),
    ("{seed: 5, share: []}", "method.noise.blend.share is an empty list; give one share for each sample, or 0"),
    ("{seed: -1, share: 0.5}", "method.noise.blend.seed must be in 0..2^64-1 or null, got -1"),
    (
        "{seed: 5, share: [0.1, 0.2, 0.3]}",
        "method.noise.blend.share=[0.1, 0.2, 0.3] must have one item for each of prompts.samples_per_prompt=2",
    ),
]


@pytest.mark.parametrize(("blended", "message"), REFUSED, ids=lambda value: str(value)[-40:])
def test_impossible_blends_are_refused_by_name(refused, job_file, blended, message):
    assert message in refused("generate", job_file, f"method.noise.blend={blended}")


def test_a_list_of_another_length_is_refused_in_python(tiny):
    with pytest.raises(UserError, match=r"\[0.1, 0.2\] must have one item for each of the number of panoramas=3"):
        sample(sampler_of(tiny, "blend={seed: 5, share: [0.1, 0.2]}"), seeds=[1, 2, 3])


def test_fingerprint_and_json_have_the_blend_only_where_it_acts(job_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def built(*overrides):
        job = load_job(job_file, [f"method.noise.{each}" for each in overrides])
        return manifest.build(job, build_plan(job), "float32")

    plain, aligned = built(), built("align=0.1")
    for off in ("{seed: 5, share: 0}", "{seed: null, share: [0, 0.0]}", "{seed: 5}"):
        assert built(f"blend={off}").fingerprint == plain.fingerprint
        assert built("align=0.1", f"blend={off}").fingerprint == aligned.fingerprint
    assert aligned.identity["method"]["noise"] == {"align": 0.1}
    assert built("blend={seed: 5, share: 1}").fingerprint == built("blend={seed: 5, share: 1.0}").fingerprint
    on = built("blend={seed: 5, share: 0.5}")
    assert on.identity["method"]["noise"] == {"align": 0.0, "blend": {"seed": 5, "share": 0.5}}
    others = [plain, aligned, on, built("blend={seed: 6, share: 0.5}"), built("blend={seed: 5, share: [0.5, 0.4]}")]
    assert len({each.fingerprint for each in others}) == 5


def test_each_task_names_the_seed_and_share_of_its_blend(job_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shares = "method.noise.blend.share=[0.25, 0.75]"
    for overrides in ([shares], [shares, "method.noise.blend.seed=9"]):
        plan = build_plan(load_job(job_file, overrides))
        for prompt in range(2):
            first, second = tasks_of(plan)[2 * prompt : 2 * prompt + 2]
            seed = 9 if len(overrides) == 2 else first.seed
            assert (first.blend, second.blend) == (NoiseBlend(seed, 0.25), NoiseBlend(seed, 0.75))
    assert tasks_of(build_plan(load_job(job_file)))[0].blend is None


def test_dataset_records_the_blend_and_regenerates_its_samples(madgen_here, job_file, tmp_path):
    run = ("generate", job_file, "prompts.limit=1", "prompts.seed=3", "method.noise.blend.share=[1, 0.9]")
    assert madgen_here(*run).code == 0
    with tarfile.open(next((tmp_path / "out/shards").glob("*.tar"))) as tar:
        names = sorted(name for name in tar.getnames() if name.endswith(".json"))
        records = [json.load(tar.extractfile(name)) for name in names]
    assert [record["blend"] for record in records] == [
        {"seed": records[0]["seed"], "share": 1.0},
        {"seed": records[0]["seed"], "share": 0.9},
    ]
    assert records[0]["method"]["noise"]["blend"] == {"seed": None, "share": [1.0, 0.9]}
    again = madgen_here("regenerate", "out", names[1].removesuffix(".json"), "-o", "again.png")
    assert (again.code, "the same pixels" in again.out) == (0, True), again.err
    assert madgen_here("verify", "out").code == 0
    other = madgen_here(*run[:-1], "method.noise.blend.share=[1, 0.8]")
    assert other.code == 2
    assert "method.noise.blend.share: [1.0, 0.9] there, [1.0, 0.8] here" in other.err


def test_single_panoramas_take_the_first_share(madgen_here, job_file, tmp_path):
    pictures = []
    for name, overrides in {
        "plain": ["prompts.seed=5"],
        "blended": ["method.noise.blend={seed: 5, share: [1, 0]}"],
    }.items():
        assert madgen_here("sample", "a hill", "-o", f"{name}.png", "--job", job_file, *overrides).code == 0
        pictures.append(Image.open(tmp_path / f"{name}.png").tobytes())
    assert pictures[0] == pictures[1]
