"""Small datasets as `generate` would leave them, written with tarfile alone, for the tests of the gallery."""

import io
import json
import tarfile

from PIL import Image
from synthetic import with_checksums

from madgen.dataset.format import Manifest, PlanTotals, SampleEntry, Sidecar
from madgen.dataset.layout import DatasetDir

HOSTILE = (
    "a <script>document.title='hacked'</script> & \"quoted\" 'single' <!--\n</script\u2028> "
    "<img src=x onerror=document.title='hacked'> &lt;b&gt; ${alert(1)} {{name}}"
)
SEED = 2**63 - 1
MANY = 150


def new_dataset(folder, name="job", planned=1234):
    """A dataset of `planned` samples in which no shard is done yet."""
    folder.mkdir()
    (folder / "shards").mkdir()
    manifest = Manifest("f", {"name": name}, PlanTotals(planned, planned, 9, 200, ""))
    (folder / "dataset.json").write_bytes(manifest.to_json())
    return folder


def picture(colour, width=640, height=160, suffix="png"):
    """One colour, its upper left quarter white."""
    image = Image.new("RGB", (width, height), colour)
    image.paste("white", (0, 0, width // 2, height // 2))
    return encoded(image, suffix)


def encoded(image, suffix="png"):
    buffer = io.BytesIO()
    image.save(buffer, format={"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}[suffix])
    return buffer.getvalue()


def add_shard(
    directory, number, prompts, *, order=("json", "picture", "txt"), suffix="png", finished=True, keys=None,
    pictures=None, scores=None, loop=False, width=640, height=160,
):  # fmt: skip
    """A shard of one sample per prompt, keys `NNNN_II`; its sidecar only when it is finished."""
    name = DatasetDir(directory).read_manifest().name
    path = directory / "shards" / f"{'pano' if '/' in name else name}-{number:06d}.tar"
    listed = []
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for index, prompt in enumerate(prompts):
            key = keys[index] if keys else f"{number:04d}_{index:02d}"
            found = {"scores": scores[index]} if scores and scores[index] else {}
            meta = {"key": key, "prompt": prompt, "seed": SEED, "sampling": {"loop": loop, "sizes": [64, 8]}, **found}
            image = pictures[index] if pictures else picture((200, 40 * index % 256, 90), width, height, suffix)
            contents = {"json": json.dumps(meta).encode(), "picture": image, "txt": prompt.encode()}
            offset = tar.offset
            for kind in order:
                info = tarfile.TarInfo(f"{key}.{suffix if kind == 'picture' else kind}")
                info.size = len(contents[kind])
                tar.addfile(info, io.BytesIO(contents[kind]))
            size = tar.offset - offset
            listed.append(SampleEntry(key, SEED, prompt, offset, size, "", height, width, found.get("scores")))
    if finished:
        path.with_suffix(".json").write_bytes(Sidecar(path.stem, number, with_checksums(path, listed)).to_json())
    return path
