"""Change samples in finished shards, with tar and sidecar consistent again: what checksums alone do not find."""

import hashlib
import io
import json
import tarfile

from PIL import Image, PngImagePlugin


def samples_of(path):
    """Return [(key, {extension: content})] of a tar."""
    samples = []
    with tarfile.open(path) as tar:
        for member in tar:
            key, _, extension = member.name.partition(".")
            if not samples or samples[-1][0] != key:
                samples.append((key, {}))
            samples[-1][1][extension] = tar.extractfile(member).read()
    return samples


def records(name, data):
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.uname, info.gname = len(data), 0o444, "madgen", "madgen"
    return info.tobuf(tarfile.PAX_FORMAT) + data + bytes(-len(data) % 512)


def rewrite(directory, name, change):
    """Apply `change(metadata, members, entry)` to the first sample, and make tar and sidecar consistent again."""
    sidecar, data = json.loads(directory.sidecar(name).read_text(encoding="utf-8")), b""
    for number, (key, members) in enumerate(samples_of(directory.tar(name))):
        entry = sidecar["samples"][number]
        if number == 0:
            metadata = json.loads(members["json"])
            change(metadata, members, entry)
            members["json"] = (json.dumps(metadata, sort_keys=True, ensure_ascii=False) + "\n").encode()
        written = b"".join(records(f"{key}.{extension}", content) for extension, content in sorted(members.items()))
        entry |= {"offset": len(data), "size": len(written), "sha256": hashlib.sha256(written).hexdigest()}
        data += written
    directory.tar(name).write_bytes(data + bytes(-(len(data) + 1024) % 10240 + 1024))
    directory.sidecar(name).write_text(json.dumps(sidecar), encoding="utf-8")


def embed(metadata, members):
    """Make the metadata in the image agree as well."""
    info, stream = PngImagePlugin.PngInfo(), io.BytesIO()
    info.add_text("parameters", json.dumps(metadata))
    Image.open(io.BytesIO(members["png"])).save(stream, "PNG", pnginfo=info)
    members["png"] = stream.getvalue()


def changed(**changes):
    def change(metadata, members, entry):
        metadata.update(changes)
        entry.update({name: value for name, value in changes.items() if name in entry})
        members["txt"] = metadata["prompt"].encode()

    return change


def and_embedded(change):
    def change_all(metadata, members, entry):
        change(metadata, members, entry)
        embed(metadata, members)

    return change_all
