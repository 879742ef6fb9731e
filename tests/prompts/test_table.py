"""Prompt tables: equal to a naive implementation for any batch size; saved, loaded and cached."""

import gzip
import hashlib
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from plans import table_of

from madgen.config.loader import load_job
from madgen.config.schema import PromptsConfig
from madgen.dataset.plan import build_plan
from madgen.prompts.builder import BATCH_ROWS, TableBuilder
from madgen.prompts.cache import plan_key
from madgen.prompts.characters import is_blank
from madgen.prompts.duplicates import IdIndex
from madgen.prompts.reading import read_prompts
from madgen.prompts.rows import Defaults, default_id
from madgen.prompts.table import PromptTable
from madgen.types import Box, MaskFile, MaskPicture, PictureFile, Prompt, Ramp, Region
from madgen.utils.errors import UserError

IDS = st.text("ab-", min_size=1, max_size=3)
TEXTS = st.text(
    st.characters(exclude_categories=("Cc", "Cf", "Cs", "Cn", "Zl", "Zp"), exclude_characters="\ufffd"),
    min_size=1,
    max_size=6,
).filter(lambda text: not is_blank(text))
LINE = st.fixed_dictionaries(
    {"prompt": TEXTS},
    optional={
        "id": IDS,
        "negative_prompt": st.sampled_from(["", "fog", "x"]),
        "width": st.sampled_from([64, 128]),
        "seed": st.integers(0, 9),
        "across": st.lists(st.sampled_from(["a", "b"]), max_size=2),
    },
)


def read(path, batch_rows=BATCH_ROWS, **options):
    return read_prompts(PromptsConfig(source=str(path), negative_prompt="fog", **options), 64, 128, batch_rows)


FUZZED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def naive(lines, policy, limit):
    """Reference implementation with dicts and loops."""
    kept = {}
    for number, line in enumerate(lines, 1):
        if len(kept) == limit:
            break
        identity = line.get("id", default_id(line["prompt"]))
        if identity in kept:
            if policy == "skip":
                continue
            if policy == "error":
                return f"p.jsonl:{number}: same id as p.jsonl:{kept[identity][0]}: "
            stem, count = identity[:88], 2
            while (identity := f"{stem}-{count}") in kept:
                count += 1
        negative = line.get("negative_prompt", "fog")
        places = line.get("across", [])
        regions = tuple(Region(Ramp(i, len(places) + 1), text, negative) for i, text in enumerate(places, 1))
        size = 64, line.get("width", 128)
        kept[identity] = number, Prompt(identity, line["prompt"], negative, *size, line.get("seed"), regions)
    return [prompt for _, prompt in kept.values()]


@FUZZED
@given(
    lines=st.lists(LINE, min_size=1, max_size=30),
    policy=st.sampled_from(["error", "skip", "rename"]),
    limit=st.none() | st.integers(1, 20),
    batch=st.integers(1, 7),
    only_texts=st.booleans(),
)
def test_table_equals_a_naive_implementation(tmp_path, lines, policy, limit, batch, only_texts):
    lines = [{"prompt": line["prompt"]} for line in lines] if only_texts else lines
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    wanted = naive(lines, policy, limit)
    options = {"limit": limit, "on_duplicate": policy, "batch_rows": batch, "samples_per_prompt": 2}
    if isinstance(wanted, str):
        with pytest.raises(UserError) as refused:
            read(path, **options)
        assert wanted in str(refused.value).replace(str(tmp_path) + "/", "")
        return
    table = read(path, **options)
    assert list(table) == wanted
    assert [table[row] for row in range(len(table))] == wanted
    assert table[1:-1] == wanted[1:-1]
    assert table[-1] == wanted[-1]
    keys = "".join(f"{prompt.id}-{sample:04d}\n" for prompt in wanted for sample in range(2))
    assert table.header.keys_digest == hashlib.sha256(keys.encode()).hexdigest()
    other = table_of(wanted)  # with other defaults, batches and lines
    assert table.header.prompts_digest == other.header.prompts_digest
    check_totals(table, wanted)


def check_totals(table, wanted):
    totals = table.header.totals
    sizes = [(prompt.height, prompt.width) for prompt in wanted]
    assert list(totals.sizes) == list(dict.fromkeys(sizes))
    assert {size: sizes.count(size) for size in sizes} == {
        size: counts.prompts for size, counts in totals.sizes.items()
    }
    for size, counts in totals.sizes.items():
        here = [prompt for prompt in wanted if (prompt.height, prompt.width) == size]
        assert counts.texts == sum(1 + len(prompt.regions) for prompt in here)
        distinct = [len({prompt.negative, *(region.negative for region in prompt.regions)}) for prompt in here]
        assert counts.negatives == sum(distinct)
        alone = [[region for region in prompt.regions if not isinstance(region.mask, Ramp)] for prompt in here]
        others = [
            {prompt.negative, *(region.negative for region in prompt.regions if isinstance(region.mask, Ramp))}
            for prompt in here
        ]
        assert counts.negatives_apart == sum(map(len, alone)) + sum(map(len, others))
    assert bool(totals.negative) == any(prompt.negative or any(r.negative for r in prompt.regions) for prompt in wanted)
    assert list(table.rows_with_regions()) == [row for row, prompt in enumerate(wanted) if prompt.regions]
    for size in (0, 2, 5):
        found = list(table.rows_longer_than(size))
        assert {row for row, prompt in enumerate(wanted) if len(prompt.text.encode()) > size} <= set(found)
        assert totals.longer_than(size) == len(found)


@FUZZED
@given(
    content=st.binary(max_size=200),
    name=st.sampled_from(["txt", "jsonl", "json", "csv", "parquet"]),
    pack=st.booleans(),
)
def test_any_bytes_give_a_table_or_a_user_error(tmp_path, content, name, pack):
    refuse_or_read(tmp_path / f"p.{name}", content)
    if name != "parquet":
        refuse_or_read(tmp_path / f"p.{name}.gz", gzip.compress(content) if pack else content)


STARTS = {"jsonl": '{"prompt": "a", "id": ', "json": '{"a": ', "csv": "prompt,id,seed,across\na,", "txt": "a\n"}


@FUZZED
@given(content=st.text(max_size=60), name=st.sampled_from(list(STARTS)))
def test_any_text_after_a_valid_start_gives_a_table_or_a_user_error(tmp_path, content, name):
    refuse_or_read(tmp_path / f"p.{name}", (STARTS[name] + content).encode("utf-8", "surrogatepass"))


@FUZZED
@given(place=st.floats(0, 1), byte=st.integers(0, 255), end=st.floats(0, 1))
def test_damaged_parquet_file_gives_a_table_or_a_user_error(tmp_path, place, byte, end):
    path = tmp_path / "good.parquet"
    if not path.exists():
        pq.write_table(pa.table({"prompt": [f"a hill {i}" for i in range(99)], "seed": range(99)}), path)
    content = bytearray(path.read_bytes())
    content[min(int(place * len(content)), len(content) - 1)] = byte
    refuse_or_read(tmp_path / "bad.parquet", bytes(content[: int(end * len(content)) if end < 0.5 else None]))


def refuse_or_read(path, content):
    path.write_bytes(content)
    try:
        table = read(path)
    except UserError as error:
        assert str(error)
    else:
        assert len(table) == len(list(table)) > 0


MASKS = (Box(0, 0, 8, 8), MaskFile("/a/b.png", "00ff"), MaskPicture("abcd"), Ramp(1, 3))
EVERYTHING = [
    Prompt("a", "ä hill", "", 0, 0),
    Prompt("b", "a lake", "fog", 64, 128, 2**64 - 1, tuple(Region(mask, "hut", "ice") for mask in MASKS)),
    Prompt("d", "a sea", "", 0, 0, pictures={"image": PictureFile("/a.png", "00ff", 8, 16)}, place=(0, 4)),
    Prompt("e", "a bay", "", 0, 0, pictures={"image": PictureFile("/a.tar", "00ff", 8, 16, (512, 99))}),
    *(Prompt(f"c{number}", "text " * number, "", 64, 64 * number) for number in range(1, 50)),
]


@pytest.mark.parametrize("in_memory", [0, 2000, 10**9])
def test_saved_table_is_loaded_unchanged(tmp_path, in_memory):
    builder = TableBuilder(PromptsConfig(), Defaults("", 0, 0), ["x.txt"], batch_rows=7, in_memory=in_memory)
    for line, prompt in enumerate(EVERYTHING, 1):
        builder.add(prompt, 0, line)
    table = builder.finish()
    table.save(tmp_path / "t.arrow")
    opened = PromptTable.open(tmp_path / "t.arrow")
    assert list(opened) == list(table) == EVERYTHING
    assert opened.header == table.header
    assert opened.location(9) == "x.txt:10"
    assert os.listdir(tmp_path) == ["t.arrow"]
    with pytest.raises(IndexError):
        opened[len(opened)]


@pytest.mark.parametrize("damage", [b"", b"ARROW1", None, "half", "other"])
def test_damaged_table_is_refused(tmp_path, damage):
    path = tmp_path / "t.arrow"
    table_of(EVERYTHING).save(path)
    content = path.read_bytes()
    if damage is None:
        path.unlink()
    elif damage == "other":
        with pa.ipc.new_file(path, pa.schema([])):
            pass
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "half" else damage)
    with pytest.raises(UserError, match=r"is (missing or )?damaged"):
        PromptTable.open(path)


def test_index_finds_ids_with_equal_hashes(monkeypatch):
    monkeypatch.setattr("madgen.prompts.duplicates.hash", lambda name: len(name) % 3, raising=False)
    monkeypatch.setattr("madgen.prompts.duplicates.MAX_RUN", 64)
    ids = [f"{'x' * (number % 5)}{number}" for number in range(300)]
    index = IdIndex(lambda rows: [ids[row] for row in rows])
    for start in range(0, 300, 20):
        index.add(ids[start : start + 20], start)
    assert index.find(["no", *ids, "x"]) == {1 + row: row for row in range(300)}


def test_errors_are_reported_in_the_order_of_rows_up_to_the_limit(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": "a"}\n{', encoding="utf-8")
    with pytest.raises(UserError, match=r"p.jsonl:3: same id as .*p.jsonl:1"):
        read(path)
    assert len(read(path, limit=2)) == 2
    with pytest.raises(UserError, match=r"p.jsonl:4 is not valid JSON"):
        read(path, on_duplicate="skip")


@pytest.fixture
def job(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("L", (128, 64), 255).save("mask.png")
    Path("p.txt").write_text("a hill\na lake\n", encoding="utf-8")
    Path("p.jsonl").write_text('{"prompt": "a", "regions": [{"mask": "mask.png", "prompt": "b"}]}\n', encoding="utf-8")

    def load(*overrides):
        return load_job([], ["prompts.source=p.txt", "sampling.height=64", "sampling.width=128", *overrides])

    return load


def test_cached_plan_is_not_read_again(job, tmp_path, monkeypatch):
    plan = build_plan(job("prompts.samples_per_prompt=3"))
    path = plan.save(tmp_path / "cache")
    assert path.name == f"{plan.key}.arrow"
    monkeypatch.setattr("madgen.dataset.plan.read_prompts", lambda *_: pytest.fail("the prompts were read again"))
    again = build_plan(job("prompts.samples_per_prompt=3"), tmp_path / "cache")
    assert list(again.prompts) == list(plan.prompts)
    assert (again.keys_digest, again.prompts_digest) == (plan.keys_digest, plan.prompts_digest)
    assert again.shard(0) == plan.shard(0)


def test_damaged_cache_is_ignored(job, tmp_path):
    path = build_plan(job()).save(tmp_path / "cache")
    path.write_bytes(path.read_bytes()[:-9])
    assert len(build_plan(job(), tmp_path / "cache").prompts) == 2


def test_a_flipped_byte_in_the_cache_is_noticed(job, tmp_path):
    plan = build_plan(job())
    path = plan.save(tmp_path / "cache")
    content = path.read_bytes()
    at = content.index(b"a hill")
    for place in (at, 10, len(content) // 2, len(content) - 40, len(content) - 1):
        flipped = bytearray(content)
        flipped[place] ^= 1
        path.write_bytes(flipped)
        assert [prompt.text for prompt in build_plan(job(), tmp_path / "cache").prompts] == ["a hill", "a lake"]
        with pytest.raises(UserError, match="checksum mismatch"):
            PromptTable.open(path)


def test_a_prompt_file_that_changed_with_size_and_time_kept_is_read_again(job, tmp_path):
    path = tmp_path / "p.txt"
    before = path.stat()
    build_plan(job()).save(tmp_path / "cache")
    path.write_text("a hall\na lake\n", encoding="utf-8")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert build_plan(job(), tmp_path / "cache").prompts[0].text == "a hall"


def test_changed_mask_of_a_row_invalidates_the_cache(job, tmp_path):
    wanted = job("prompts.source=p.jsonl")
    plan = build_plan(wanted)
    plan.save(tmp_path / "cache")
    assert build_plan(wanted, tmp_path / "cache").prompts_digest == plan.prompts_digest
    Image.new("L", (128, 64), 254).save("mask.png")
    os.utime("mask.png", ns=(1, 1))
    assert build_plan(wanted, tmp_path / "cache").prompts_digest != plan.prompts_digest


def test_plan_key_depends_on_prompts_and_size_only(job):
    region = "prompts.regions=[{mask: mask.png, prompt: b}]"
    others = [
        "prompts.source=p.jsonl", "prompts.samples_per_prompt=2", "prompts.limit=1", "prompts.on_duplicate=skip",
        "prompts.negative_prompt=x", "sampling.width=64", "sampling.height=128", "prompts.across=[x]", region,
    ]  # fmt: skip
    keys = [plan_key(job()), *(plan_key(job(other)) for other in others)]
    assert len(set(keys)) == len(keys)
    same = ["output.samples_per_shard=7", "prompts.seed=5", "sampling.guidance_scale=3", "name=other"]
    assert {plan_key(job(other)) for other in same} == {plan_key(job())}
    before = plan_key(job(region))
    os.utime("mask.png", ns=(1, 1))
    assert plan_key(job(region)) != before
    os.utime("p.txt", ns=(1, 1))
    assert plan_key(job()) != keys[0]
