"""Folders with a network, and repositories of the Hugging Face Hub: what `pretrained.py` offers as methods.

A folder holds `model.safetensors`, a file of `checkpoint.save`, which is all that the network needs; `config.json` says
the same in the open, and has to agree; `README.md` is the model card.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from parnet_kernels._version import __version__
from parnet_kernels.checkpoint import CheckpointError, load_checkpoint, load_model, read_metadata, save
from parnet_kernels.deployed import DeployedParNet
from parnet_kernels.files import write_whole
from parnet_kernels.model import ParNet

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
#: Of `config.json`; a reader refuses a later one.
FORMAT = 1
MAX_CONFIG = 1 << 25  # bytes

_CARD = """---
library_name: parnet-kernels
pipeline_tag: image-classification
tags:
- parnet
- image-classification
- pytorch
---

# ParNet

An image classifier of the architecture ParNet ([Non-deep Networks](https://arxiv.org/abs/2110.07641)), saved by
parnet-kernels {version}.

| | |
|---|---|
| form | {form} |
| streams and last map | {planes} channels |
| blocks of the streams | {blocks} |
| activation | {activation} |
| input | {channels} channels; {preprocessing} |
| classes | {classes} |

```python
from parnet_kernels import {cls}

network = {cls}.from_pretrained("{name}"){deploy}
```

## Data, training, results, limits, licence
To be filled in by who trained it.
"""


# ------------------------------------------------------------------ writing


def save_folder(network: Any, folder: str | Path, name: str = "folder or user/name") -> None:
    """See `Pretrained.save_pretrained`. `name`: of the repository, for the model card."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise FileExistsError(f"save_pretrained: `folder` must be a folder, got the file {folder}") from error
    save(network, folder / WEIGHTS)
    metadata = read_metadata(folder / WEIGHTS)
    texts = {key: json.loads(text) for key, text in metadata.items() if key != "parnet_form"}
    config = {"parnet_format": FORMAT, "parnet_kernels": __version__, "parnet_form": metadata["parnet_form"], **texts}
    write_whole(folder / CONFIG, (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())
    if not (folder / CARD).exists():
        write_whole(folder / CARD, _card(network, metadata["parnet_form"], name).encode())


def _card(network: Any, form: str, name: str) -> str:
    config = network.config
    named = "" if network.class_names is None else ", with names"
    return _CARD.format(
        version=__version__,
        form=form,
        planes=", ".join(map(str, config.planes)),
        blocks=", ".join(str(n - 1) for n in config.num_blocks),
        activation=config.activation,
        channels=config.in_chans,
        preprocessing=network.preprocessing or "how pictures become inputs is not said",
        classes=f"{config.num_classes}{named}" if config.num_classes else "none: features",
        cls=type(network).__name__ if type(network) in (ParNet, DeployedParNet) else "DeployedParNet",
        deploy="" if form == "deployed" else ".deploy()",
        name=name,
    )


def push(network: Any, repo_id: str, private: bool | None, token: Any, options: dict[str, Any]) -> str:
    """See `Pretrained.push_to_hub`."""
    library = _library("push_to_hub")
    api = library.HfApi(token=token)
    try:
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            save_folder(network, folder, repo)
            if api.file_exists(repo, CARD, revision=options["revision"]):
                (Path(folder) / CARD).unlink()
            return str(api.upload_folder(repo_id=repo, folder_path=folder, **options).commit_url)
    except (library.errors.HfHubHTTPError, library.errors.HFValidationError) as error:
        raise OSError(f"push_to_hub: {repo_id}: {_first_line(error)}") from error


# ------------------------------------------------------------------ reading


def load(cls: type, name_or_path: str | Path, options: dict[str, Any]) -> Any:
    """See `Pretrained.from_pretrained`."""
    folder = Path(name_or_path)
    there = folder.is_dir()
    where = str(name_or_path)
    paths = {name: folder / name if there else _download(where, name, options) for name in (CONFIG, WEIGHTS)}
    _explain_foreign(paths, where)
    form = _checked_form(paths, where)
    if issubclass(cls, DeployedParNet):
        network: Any = load_model(paths[WEIGHTS])
    elif form == "deployed":
        raise CheckpointError(f"{where} holds a ParNet in deployed form: use DeployedParNet.from_pretrained")
    else:
        network = load_checkpoint(paths[WEIGHTS])
    if type(network) is cls:
        return network
    own = cls(network.config).to(next(iter(network.state_dict().values())).dtype)  # a class of the user's
    own.load_state_dict(network.state_dict())
    return own.described_as(network).eval()


def _explain_foreign(paths: dict[str, Path], where: str) -> None:
    """Raises CheckpointError where a file is missing, saying what is there."""
    missing = [name for name, path in paths.items() if not path.is_file()]
    if missing:
        found = sorted(path.name for path in paths[missing[0]].parent.iterdir())[:5]
        there = f"it has {', '.join(found)}" if found else "it is empty"
        raise CheckpointError(
            f"{where} was not written by save_pretrained: it has no {missing[0]}; {there}. "
            "load_checkpoint and load_model read single files"
        )


def _checked_form(paths: dict[str, Path], where: str) -> str:
    """The form that both files say.

    Raises:
        CheckpointError: they do not, or cannot be read.
    """
    try:
        if paths[CONFIG].stat().st_size > MAX_CONFIG:
            raise ValueError(f"more than {MAX_CONFIG} bytes")
        config = json.loads(paths[CONFIG].read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: {CONFIG} is truncated, or no JSON: {error}") from error
    if not isinstance(config, dict) or "parnet_form" not in config:
        kind = config.get("architectures", config.get("architecture")) if isinstance(config, dict) else None
        told = f": it describes {kind!r}" if kind else ""
        raise CheckpointError(f"{where} is not a ParNet of parnet_kernels, by its {CONFIG}{told}")
    if config.get("parnet_format") != FORMAT:
        raise CheckpointError(
            f"{where}: {CONFIG} has format {config.get('parnet_format')!r}, this version reads {FORMAT}; "
            f"it was written by parnet_kernels {str(config.get('parnet_kernels'))[:40]}, this is {__version__}"
        )
    metadata = read_metadata(paths[WEIGHTS])
    for key in ("parnet_form", "parnet_config", "parnet_preprocessing", "parnet_class_names"):
        text = metadata.get(key)
        try:
            said = text if key == "parnet_form" or text is None else json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{where}: `{key}` in {WEIGHTS} is no JSON: {error}") from error
        if said != config.get(key):
            raise CheckpointError(
                f"{where}: `{key}` differs in {CONFIG} and {WEIGHTS}; save_pretrained writes both: set it on a network"
            )
    return str(config["parnet_form"])


def _download(name: str, file: str, options: dict[str, Any]) -> Path:
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        raise FileNotFoundError(f"from_pretrained: no folder {name}")
    library = _library(f"from_pretrained: no folder {name}, and the Hub")
    errors = library.errors
    try:
        return Path(library.hf_hub_download(name, file, library_name="parnet_kernels", **options))
    except errors.EntryNotFoundError as error:
        if isinstance(error, errors.LocalEntryNotFoundError):
            raise FileNotFoundError(
                f"from_pretrained: no folder {name}, and the Hub's {name}/{file} is neither here nor reached: "
                f"{_first_line(error)}"
            ) from error
        raise CheckpointError(f"{name} was not written by push_to_hub: it has no {file}") from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        raise FileNotFoundError(
            f"from_pretrained: no folder {name}, and nothing on the Hub: {_first_line(error)}"
        ) from error


def _library(what: str) -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        raise ImportError(f"{what} needs `pip install parnet-kernels[hub]`: {error}") from error
    return huggingface_hub


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
