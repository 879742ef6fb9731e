"""Errors about values of the wrong type name the key, the value and what is expected, in the words of a job file."""

import re
from dataclasses import fields, is_dataclass

import pytest

from madgen import load_job
from madgen.config.documentation import summary
from madgen.config.explanations import known_keys
from madgen.config.schema import Job
from madgen.utils.errors import UserError

VALUES = ("abc", "", "null", "[1]", "{a: 1}", "1.5", "true", "4GB", "-1", "nan", "3,4")
INTERNAL = re.compile("None|OmegaConf|Optional|ListConfig|DictConfig|Float|Integer|of type|valid bool|Union|subclass")


def one_key_of_each_type():
    """Return a key for each annotation, and all sections."""
    keys = {}
    for key in known_keys(Job()):
        config = Job()
        *sections, name = key.split(".")
        for section in sections:
            config = getattr(config, section)
        is_section = is_dataclass(getattr(config, name))
        keys.setdefault(key if is_section else next(field.type for field in fields(config) if field.name == name), key)
    return sorted(keys.values())


@pytest.mark.parametrize("key", one_key_of_each_type())
def test_errors_have_the_words_of_a_job_file(key):
    for value in VALUES:
        try:
            load_job([], [f"{key}={value}"])
        except UserError as error:
            message = str(error)
            assert key in message or message.startswith("output.dir must be"), message
            assert not INTERNAL.search(message), message
            assert "\n" not in message


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("backbone.gpu_memory=4GB", "got '4GB'; write 4 without a unit (Memory of the GPU in GiB, > 0, such as 24 or"),
        ("sampling.width=512px", "sampling.width must be a whole number, got '512px'; write 512 without a unit (Width"),
        ("prompts.limit=abc", "prompts.limit must be a whole number, got 'abc' ("),
        ("sampling.loop=maybe", "sampling.loop must be true or false, got 'maybe' ("),
        ("backbone.ip_adapter=a.safetensors", "backbone.ip_adapter is a section: set its keys, such as backbone.ip_ad"),
        ("method.mad=", "method.mad is a section: set its keys, such as method.mad.steps, or remove it, got null"),
        ("sampling.guidance_steps=4", "sampling.guidance_steps is a list: write sampling.guidance_steps=[...]"),
        ("backbone.loras=[{scale: 1}]", "backbone.loras[0].weights is missing; an item of backbone.loras is a map"),
        ("backbone.loras=[{weights: a, scale: b}]", "scale of an item of backbone.loras must be a number, got 'b'"),
        (
            "backbone.loras=[{weights: a, scal: 1}]",
            "unknown key 'scal' of an item of backbone.loras; did you mean 'scale'",
        ),
        ("backbone.loras=[{weights: a, x: 1}]", "unknown key 'x' of an item of backbone.loras; known: weights, scale"),
        ("method.mad.step=3", "unknown key 'method.mad.step'; did you mean 'method.mad.steps'?"),
        ("method.views.overlap=3", "unknown key 'method.views.overlap'; did you mean 'method.views.overlap_from'?"),
        ("sampling.samples_per_shard=3", "did you mean 'output.samples_per_shard'?"),
        ("method.noise.foo=3", "unknown key 'method.noise.foo'; method.noise has align, blend"),
        ("width=3", "unknown key 'width'; did you mean 'sampling.width'?"),
        ("widht=3", "unknown key 'widht'; did you mean 'sampling.width'?"),
        (
            "method.mad.blocks=early",
            "method.mad.blocks is a list: write method.mad.blocks=[...], such as method.mad.blocks=[early]",
        ),
        ("method.mad.blocks=[1", "cannot read the override 'method.mad.blocks=[1': close its brackets and quotes"),
        ("prompts.regions=[1]", "an item of prompts.regions is a mapping, such as {mask: [0, 0, 64, 64], prompt:"),
        ("prompts.columns=caption", "prompts.columns is a mapping: write prompts.columns={key: value}, got caption"),
    ],
)
def test_what_is_expected_is_named(word, message):
    with pytest.raises(UserError) as refused:
        load_job([], [word])
    assert message in str(refused.value)


FLOATS = [
    "sampling.guidance_scale", "sampling.init.scale", "sampling.init.strength", "method.mad.share",
    "method.noise.align", "method.noise.blend.share", "method.sync.weight", "method.sync.decay", "backbone.gpu_memory",
    "backbone.controlnet.scale", "backbone.controlnet.start", "backbone.controlnet.end", "backbone.ip_adapter.scale",
    "quarantine.max_share",
]  # fmt: skip


@pytest.mark.parametrize("key", FLOATS)
def test_numbers_must_be_finite(key):
    for value in (".inf", "-.inf", ".nan"):
        with pytest.raises(UserError, match=r"finite number|in 0\.\.1|0 <|> 0 and <= 1") as refused:
            load_job([], [f"{key}={value}"])
        assert key.rpartition(".")[2] in str(refused.value)


def test_every_number_is_among_those_that_must_be_finite():
    defaults = Job()
    floats = set()
    for key in known_keys(defaults):
        config = defaults
        *sections, name = key.split(".")
        for section in sections:
            config = getattr(config, section)
        kind = next(field.type for field in fields(config) if field.name == name)
        floats |= {key} if "float" in str(kind) else set()
    assert floats - set(FLOATS) == set()


def test_every_key_has_a_summary():
    keys = [key for key in known_keys(Job()) if not any(other.startswith(f"{key}.") for other in known_keys(Job()))]
    assert [key for key in keys if not summary(Job(), key)] == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("jobs/mine.yml", "job file jobs/mine.yml does not exist; did you mean 'jobs/mine.yaml'?"),
        ("jobs/demo.yaml", "job file jobs/demo.yaml does not exist; the packaged one is called 'demo'"),
        (
            "3}",
            "job file 3} does not exist; put an override with spaces in quotes, such as "
            "'sampling.scheduler_options={shift: 3}'",
        ),
        ("jobs/else.yaml", "job file jobs/else.yaml does not exist"),
        ("preset", "there is neither a file nor a preset 'preset'; known: "),
        ("mine", "there is no preset 'mine'; did you mean the file 'mine.yaml'?"),
        ("alp", "there is neither a file nor a preset 'alp'; did you mean 'alps'?"),
    ],
)
def test_missing_job_files_are_named_as_typed(tmp_path, monkeypatch, name, message):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "jobs").symlink_to("elsewhere")
    (tmp_path / "jobs/mine.yaml").touch()
    (tmp_path / "mine.yaml").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as refused:
        load_job(name)
    assert str(refused.value) == message or (message.endswith("known: ") and str(refused.value).startswith(message))
