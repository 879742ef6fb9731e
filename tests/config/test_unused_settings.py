"""Settings that change nothing beside the others are named; operators of views that do not overlap are refused."""

import pytest

from madgen import PanoramaSampler, load_job
from madgen.config.unused_settings import unused_settings
from madgen.planning.forecast import forecast
from madgen.planning.resolved_run import ResolvedRun
from madgen.utils.errors import UserError

WHOLE = ["method.views.layout=whole"]
NO_MAD = ["method.mad.steps=0"]

UNUSED = [
    ([*NO_MAD, "method.mad.blocks=[up]"], "method.mad.blocks=[up] has no effect with method.mad.steps=0"),
    ([*NO_MAD, "method.mad.positions=fit"], "method.mad.positions=fit has no effect with method.mad.steps=0"),
    (["method.mad.share=0", "method.mad.positions=local"], "method.mad.positions=local has no effect"),
    (
        [*NO_MAD, "method.mad.cross_attention=always", "method.mad.positions=fit"],
        "method.mad.positions=fit has no effect",
    ),
    ([*WHOLE, "method.mad.blocks=[mid]"], "method.mad.blocks=[mid] has no effect with layout=whole"),
    ([*WHOLE, "method.mad.positions=fit"], "method.mad.positions=fit has no effect with layout=whole"),
    (
        [*WHOLE, "method.mad.cross_attention=always"],
        "method.mad.cross_attention=always has no effect with layout=whole",
    ),
    ([*WHOLE, "method.mad.steps=20"], "method.mad.steps=20 has no effect with layout=whole"),
    ([*WHOLE, "method.mad.share=1.0"], "method.mad.share=1.0 has no effect with layout=whole"),
    (["method.sync.decay=0.5"], "method.sync.decay=0.5 has no effect without method.sync.weight"),
    (["method.sync.steps=3"], "method.sync.steps=3 has no effect without method.sync.weight"),
    (["method.sync.every=2"], "method.sync.every=2 has no effect without method.sync.weight"),
    (["method.sync.network=random"], "method.sync.network=random has no effect without method.sync.weight"),
    (["method.noise.blend.seed=3"], "method.noise.blend.seed=3 has no effect without method.noise.blend.share"),
    (["method.noise.blend.share=0.5"], "method.noise.blend.share=0.5 has no effect on a prompt's first sample"),
    (["output.quality=80"], "output.quality=80 has no effect with output.format=png"),
    (
        ["quarantine.max_share=1", "quarantine.window=9"],
        "quarantine.window=9 has no effect with quarantine.max_share=1",
    ),
]
USED = [
    [],
    WHOLE,
    NO_MAD,
    [*NO_MAD, "method.mad.cross_attention=always", "method.mad.blocks=[up]"],
    ["method.mad.blocks=[up]", "method.mad.positions=fit"],
    ["method.sync.weight=20", "method.sync.decay=0.5", "method.sync.network=random"],
    ["method.noise.blend.share=0.5", "prompts.samples_per_prompt=2"],
    ["method.noise.blend.share=0.5", "method.noise.blend.seed=1"],
    ["output.quality=80", "output.format=jpg"],
]


@pytest.mark.parametrize(("overrides", "message"), UNUSED)
def test_settings_without_effect_are_named(overrides, message):
    (note,) = unused_settings(load_job([], overrides))
    assert note.startswith(message)


@pytest.mark.parametrize("overrides", USED)
def test_settings_with_effect_are_not_named(overrides):
    assert list(unused_settings(load_job([], overrides))) == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["sampling.width=32", "method.merge.operator=swap"],
            "method.merge.operator=swap has no effect: the views do not",
        ),
        (["method.views.stride=8", "method.merge.weights=radial"], "method.merge.weights=radial has no effect"),
        (
            ["method.views.layout=shifted", "sampling.loop=true", "method.merge.weights=gaussian"],
            "method.merge.weights=gaussian has no effect",
        ),
        (
            ["sampling.width=32", "method.sync.weight=20"],
            "method.sync compares views, but each panorama is a single view",
        ),
    ],
)
def test_operators_of_views_that_do_not_overlap_are_refused(tiny, tmp_path, monkeypatch, overrides, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("a hill\n", encoding="utf-8")
    words = [f"backbone.pretrained={tiny}", "prompts.source=p.txt", "sampling.height=32", "sampling.width=64", *NO_MAD]
    forecast(ResolvedRun.of(load_job([], words)))
    with pytest.raises(UserError) as refused:
        forecast(ResolvedRun.of(load_job([], [*words, *overrides])))
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize(
    ("word", "note"),
    [
        ("sampling.width=32", "method.mad.steps=1 has no effect: each panorama is a single view; set a larger size"),
        ("method.regions.bootstrapping=1", "method.regions.bootstrapping=1 has no effect: no prompt has regions"),
        (
            "method.views.layout=whole",
            "method.mad.steps=1 has no effect with layout=whole, which has a single view; set it to 0",
        ),
    ],
)
def test_plan_names_settings_that_no_prompt_uses(madgen_here, job_file, word, note):
    plan = madgen_here("plan", job_file, word)
    assert (plan.code, note in plan.err) == (0, True), plan.err
    assert ("no MAD" in plan.out) == (note.startswith("method.mad"))
    regions = "prompts.regions=[{mask: [0, 0, 32, 32], prompt: a hut}]"
    assert note in plan.err
    assert word[:14] != "method.regions" or madgen_here("plan", job_file, word, regions).err == ""


@pytest.mark.parametrize("command", [("plan",), ("sample", "a hut", "--job")])
def test_commands_name_settings_without_effect(madgen_here, job_file, command):
    done = madgen_here(*command, job_file, *NO_MAD, "method.mad.blocks=[up]")
    assert (done.code, "method.mad.blocks=[up] has no effect" in done.err) == (0, True), done.err


def test_samplers_log_settings_without_effect(tiny, caplog):
    PanoramaSampler.from_pretrained(str(tiny), sync_decay=0.5)
    note = "method.sync.decay=0.5 has no effect without method.sync.weight; set it, or remove it"
    assert [record.getMessage() for record in caplog.records] == [note]
