"""Locate, identify and download LoRAs, ControlNets and IP-Adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from madgen.hub.content_hash import file_hash, folder_hash
from madgen.hub.repository import cached_commit, cached_file, check_hub_id, download, hub_file, identify
from madgen.hub.safetensors_file import read_header
from madgen.hub.weights import single_file
from madgen.utils.errors import UserError
from madgen.utils.validation import expand_user

LORA_FILE = "pytorch_lora_weights.safetensors"
"""Name of the file in a folder that diffusers wrote."""
CONTROLNET_FILES = ("config.json", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model-0*.safetensors")
CONTROLNET, IP_ADAPTER = "backbone.controlnet.weights", "backbone.ip_adapter.weights"


def lora_file(weights: str, download: bool = False) -> Path | None:
    """Return the file of a LoRA; None if it is not in the Hub cache. Raises UserError for an invalid path."""
    file = single_file(weights, "backbone.loras: weights")
    if file is not None:
        return file
    folder = expand_user(weights, "backbone.loras: weights")
    if folder.is_dir():
        own = folder / LORA_FILE
        return own if own.is_file() else _only_file(folder, "backbone.loras", "give the path of one")
    check_hub_id(weights, "backbone.loras: weights")
    if download:
        return hub_file(weights, LORA_FILE, None, "backbone.loras: weights")
    return cached_file(weights, LORA_FILE)


def lora_id(weights: str) -> str | None:
    """Return the content hash of a LoRA; None if it is not in the Hub cache."""
    file = lora_file(weights)
    return None if file is None else file_hash(file)


def controlnet_id(weights: str) -> str | None:
    """Identify a ControlNet by a content hash, or the commit of a Hub id; None if it is not in the cache.

    Raises UserError for an invalid path, or a file that is not complete.
    """
    file = single_file(weights, CONTROLNET)
    if file is None:
        return identify(weights, CONTROLNET)
    read_header(file, f"{CONTROLNET}={weights}")
    return file_hash(file)


def download_controlnet(weights: str) -> list[Path]:
    """Download a ControlNet; return its folder in the Hub cache, nothing for local files."""
    if single_file(weights, CONTROLNET) is not None:
        return []
    return download(weights, [*CONTROLNET_FILES, "diffusion_pytorch_model.safetensors.index.json"], CONTROLNET)


class IpAdapterFiles(NamedTuple):
    """Location of an IP-Adapter."""

    weights: str
    """`backbone.ip_adapter.weights` of the job."""
    source: str
    """Folder or Hub id."""
    subfolder: str
    weight_name: str
    """Name of the `.safetensors` file in `subfolder`."""
    image_encoder: str
    """Path of the image encoder's folder in `source`."""

    @property
    def adapter(self) -> str:
        """Return the path of the adapter's file in `source`."""
        return "/".join(filter(None, (self.subfolder, self.weight_name)))


def ip_adapter_files(config: Any) -> IpAdapterFiles | None:
    """Locate the files of an `IpAdapterConfig`; None without weights. Raises UserError if a local file is missing."""
    key, weights, subfolder, weight_name = IP_ADAPTER, config.weights, config.subfolder, config.weight_name
    if weights is None:
        return None
    file = single_file(weights, key)
    if file is not None:
        if subfolder or weight_name is not None:
            raise UserError(f"{key}={weights} is a file: leave subfolder and weight_name of backbone.ip_adapter unset")
        folder, weight_name = file.parent, file.name
    else:
        folder = expand_user(weights, key)
    if weight_name is not None and not weight_name.endswith(".safetensors"):
        raise UserError(f"backbone.ip_adapter.weight_name={weight_name} must be a .safetensors file")
    named = config.image_encoder
    encoder = named if "/" in named else "/".join(filter(None, (subfolder, named)))
    if folder.is_dir():
        fix = "name one by backbone.ip_adapter.subfolder and weight_name"
        name = weight_name or _only_file(folder / subfolder, IP_ADAPTER, fix).name
        for path in (folder / subfolder / name, folder / encoder / "config.json"):
            if not path.is_file():
                raise UserError(f"{key}: {path} does not exist; see backbone.ip_adapter for where it is looked up")
        read_header(folder / subfolder / name, f"{key}={folder / subfolder / name}")
        return IpAdapterFiles(weights, str(folder), subfolder, name, encoder)
    check_hub_id(weights, key)
    if weight_name is None:
        raise UserError(
            f"{key}={weights} is a Hub id: name its file by backbone.ip_adapter.weight_name, such as "
            "ip-adapter_sd15.safetensors, and its folder by backbone.ip_adapter.subfolder"
        )
    return IpAdapterFiles(weights, weights, subfolder, weight_name, encoder)


def _only_file(folder: Path, key: str, fix: str) -> Path:
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        raise UserError(f"{key}: folder {folder} contains {len(files)} .safetensors files; {fix}")
    return files[0]


def ip_adapter_id(files: IpAdapterFiles) -> str | None:
    """Identify an IP-Adapter and its image encoder by content hashes, or a Hub commit; None if not in the cache."""
    folder = Path(files.source)
    if folder.is_dir():
        return f"{file_hash(folder / files.adapter)}-{folder_hash(folder / files.image_encoder)}"
    return cached_commit(files.source, files.adapter)


def download_ip_adapter(files: IpAdapterFiles) -> list[Path]:
    """Download an IP-Adapter; return its folder in the Hub cache, nothing for a local folder."""
    encoder = [f"{files.image_encoder}/{name}" for name in ("config.json", "model.safetensors")]
    return download(files.source, [files.adapter, *encoder], IP_ADAPTER)
