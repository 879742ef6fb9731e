"""Text files of a dataset on the Hub give the same prompts as local files: their columns have no guessed types."""

import subprocess
import sys

import pytest
from hub_server import serving
from processes import environment

CSV = "id,prompt,seed,place\n007,1e3,3,NA\n1e3,null,,2024-01-01\nTrue,a hill,7,00\n"
JSONL = '{"id": "007", "prompt": "2024-01-01", "seed": 1.0}\n{"id": 8, "prompt": "a hill"}\n'
SCRIPT = """
import sys
from madgen import load_job
from madgen.dataset.plan import build_plan
for source in sys.argv[1:]:
    table = build_plan(load_job([], [f"prompts.source={source}", "prompts.keep_columns=all"])).prompts
    print(table.header.prompts_digest, table.header.keys_digest, len(table))
"""


def plans(folder, *sources, **env):
    """Return a line about the prompts of each source, read by a new interpreter."""
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, sources)],
        env=environment(HF_HOME=str(folder / "cache"), **env),
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "text"), [("train.csv", CSV), ("data/train.jsonl", JSONL)])
def test_text_on_the_hub_gives_the_prompts_of_the_file_and_of_the_folder(tmp_path, name, text):
    path = tmp_path / "data" / name
    path.parent.mkdir(parents=True)
    path.write_text(text, encoding="utf-8")
    files = {name: text.encode(), "README.md": b"# A dataset\n", ".gitattributes": b""}
    with serving("datasets", "someone/places", files) as (endpoint, served):
        online = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": None, "HF_HUB_DISABLE_XET": "1"}
        file, folder, hub, again = plans(
            tmp_path, path, f"hf://{tmp_path}/data", *["hf://someone/places"] * 2, **online
        )
        assert file == folder == hub == again
        assert served.count(name) == 1
    assert plans(tmp_path, "hf://someone/places") == [file], "offline, from the cache"
