"""Text is UTF-8 in every locale: the same bytes, and no command fails to print."""

import json
import shutil
import subprocess
import sys

import pytest
from processes import environment

PROMPTS = ["Zürich 東京 café", "a hill 👩\u200d🦰", "plain"]
COMMANDS = [
    ["generate", "job.yaml"], ["plan", "job.yaml"], ["status", "out"], ["status", "out", "--json"],
    ["filter", "out", "--where", "width > 0", "-o", "part"], ["index", "part"],
    ["verify", "out"], ["verify", "part"], ["preview", "out"], ["generate", "job.yaml"],
    ["sample", "Zürich", "-o", "one.png", "--job", "job.yaml", "sampling.num_inference_steps=1"],
]  # fmt: skip
PROGRAM = f"""
import os, sys
from madgen.cli.app import main
for command in {COMMANDS!a}:
    sys.argv = ["madgen", *command]
    print("$", command[0], flush=True)
    try:
        main()
    except SystemExit as stopped:
        assert not stopped.code, (command, stopped.code)
print("\\u6771\\u4eac", sys.stdout.encoding)
"""


def locales(tmp_path):
    """Return variables of an ASCII locale, and of a Latin-1 locale if one can be made."""
    off = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LANG": None, "LC_CTYPE": None}
    found = {"C": {**off, "LC_ALL": "C"}}
    if shutil.which("localedef"):
        made = tmp_path / "en_US.ISO-8859-1"
        done = subprocess.run(["localedef", "-i", "en_US", "-f", "ISO-8859-1", made], capture_output=True, check=False)
        if done.returncode <= 1 and made.exists():
            found["Latin-1"] = {**off, "LC_ALL": "en_US.ISO-8859-1", "LOCPATH": str(tmp_path)}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["C", "Latin-1"])
def test_commands_read_and_write_utf_8_in_other_locales(madgen_here, job_file, tmp_path, name):
    lines = "".join(json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n" for prompt in PROMPTS)
    (tmp_path / "prompts.jsonl").write_text(lines, encoding="utf-8")
    job = job_file.read_text(encoding="utf-8").replace("prompts.txt", "prompts.jsonl")
    job_file.write_text(job.replace("samples_per_prompt: 2", "negative_prompt: 霧"), encoding="utf-8")
    variables = locales(tmp_path).get(name)
    if variables is None:
        pytest.skip("localedef cannot make a Latin-1 locale here")
    assert madgen_here("generate", job_file, f"output.dir={tmp_path}/utf8").code == 0
    done = subprocess.run(
        [sys.executable, "-X", "warn_default_encoding", "-c", PROGRAM], cwd=tmp_path, env=environment(**variables),
        capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-3000:]
    assert b"\\u6771\\u4eac" in done.stdout
    assert b"utf" not in done.stdout.splitlines()[-1].lower()
    warnings = [line for line in done.stderr.splitlines() if b"EncodingWarning" in line and b"/madgen/" in line]
    assert warnings == []
    for path in sorted((tmp_path / "utf8/shards").glob("*.tar")):
        assert (tmp_path / "out/shards" / path.name).read_bytes() == path.read_bytes()
    for folder in ("out", "part"):
        entries = [
            json.loads(path.read_bytes())["samples"] for path in sorted((tmp_path / folder / "shards").glob("*.json"))
        ]
        assert sorted(entry["prompt"] for shard in entries for entry in shard) == sorted(PROMPTS)
        assert (
            json.loads((tmp_path / folder / "dataset.json").read_bytes())["job"]["prompts"]["negative_prompt"] == "霧"
        )
        assert "東京" in (tmp_path / folder / "README.md").read_text(encoding="utf-8")
    import pyarrow.parquet as pq

    assert sorted(pq.read_table(tmp_path / "part/index.parquet").column("prompt").to_pylist()) == sorted(PROMPTS)


def test_what_a_terminal_cannot_print_is_escaped():
    program = "from madgen.utils.console import print_anything; print_anything(); print('Zürich 東京', '\\udcff')"
    expected = {"ascii": b"Z\\u00fcrich \\u6771\\u4eac \xff\n", "utf-8": "Zürich 東京 ".encode() + b"\xff\n"}
    for encoding, printed in expected.items():
        env = environment(PYTHONIOENCODING=encoding)
        assert (
            subprocess.run([sys.executable, "-c", program], env=env, stdout=subprocess.PIPE, check=True).stdout
            == printed
        )
