"""Folders of `save_pretrained`, and the Hub, which is played here: nothing is reached."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from oracle import randomize
from safetensors.torch import save_file

from parnet_kernels import CheckpointError, ParNet, ParNetConfig, Preprocessing, load_model
from parnet_kernels.deployed import DeployedParNet

TINY = ParNetConfig((8, 12, 16, 24), (2, 2, 2), num_classes=3, activation="relu")


def model() -> ParNet:
    made = randomize(ParNet(TINY)).eval()
    made.preprocessing, made.class_names = Preprocessing(32), ("ä", "b\n", '"c"')
    return made


def same(a: Any, b: Any) -> None:
    x = torch.randn(1, 3, 32, 32, dtype=next(iter(b.state_dict().values())).dtype)
    assert type(a) is type(b)
    assert (a.config, a.preprocessing, a.class_names) == (b.config, b.preprocessing, b.class_names)
    assert torch.equal(a(x), b(x))
    assert not a.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_both_forms(dtype: torch.dtype, tmp_path: Path) -> None:
    network = model().to(dtype)
    network.save_pretrained(tmp_path / "a" / "training")
    network.deploy().save_pretrained(tmp_path / "deployed")
    if dtype == torch.float32:
        same(ParNet.from_pretrained(tmp_path / "a" / "training"), network)
    same(DeployedParNet.from_pretrained(str(tmp_path / "deployed")), network.deploy())
    same(load_model(tmp_path / "deployed" / "model.safetensors"), network.deploy())
    with pytest.raises(CheckpointError, match=r"in deployed form: use DeployedParNet\.from_pretrained"):
        ParNet.from_pretrained(tmp_path / "deployed")


def test_training_form_is_folded_for_who_wants_the_deployed_one(tmp_path: Path) -> None:
    network = model()
    network.save_pretrained(tmp_path)
    same(DeployedParNet.from_pretrained(tmp_path), network.deploy())


class Own(ParNet):
    pass


def test_subclass_gets_its_own_class(tmp_path: Path) -> None:
    model().save_pretrained(tmp_path)
    found = Own.from_pretrained(tmp_path)
    assert type(found) is Own
    assert found.class_names == model().class_names


def test_card_and_configuration(tmp_path: Path) -> None:
    model().save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert ParNetConfig(**config["parnet_config"]) == TINY
    assert config["parnet_class_names"] == ["ä", "b\n", '"c"']
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: parnet-kernels\n")
    assert "| classes | 3, with names |" in card
    (tmp_path / "README.md").write_text("mine")
    model().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    ParNet(TINY.replace(num_classes=0)).deploy().save_pretrained(tmp_path / "b")
    assert "none: features" in (tmp_path / "b" / "README.md").read_text()


def foreign(folder: Path) -> None:
    save_file({"w": torch.zeros(1)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"architectures": ["BertModel"]}')


def only_weights(folder: Path) -> None:
    (folder / "config.json").unlink()


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def short(name: str, bytes_: int) -> Any:
    def cut(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:bytes_])

    return cut


def edited(**changes: Any) -> Any:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").write_text(json.dumps(config | changes))

    return edit


def plain_weights(folder: Path) -> None:
    save_file(model().state_dict(), folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (foreign, r"is not a ParNet of parnet_kernels.*BertModel"),
        (only_weights, r"has no config\.json; it has README\.md, model\.safetensors"),
        (only_pickle, r"has no model\.safetensors; it has README\.md, config\.json, pytorch_model\.bin"),
        (short("config.json", 40), r"config\.json is truncated"),
        (short("model.safetensors", 4000), r"cannot read .*truncated"),
        (short("model.safetensors", 0), r"cannot read .*truncated"),
        (edited(parnet_format=0), "has format 0, this version reads 1"),
        (edited(parnet_format=2, parnet_kernels="9.9"), r"written by parnet_kernels 9\.9"),
        (edited(parnet_form="deployed"), "`parnet_form` differs"),
        (edited(parnet_config={"activation": "silu"}), "`parnet_config` differs"),
        (edited(parnet_class_names=["x"]), "`parnet_class_names` differs"),
        (plain_weights, "`parnet_form` differs"),
        (lambda folder: (folder / "config.json").write_text("[" * 100_000), "config.json is truncated, or no JSON"),
        (lambda folder: (folder / "config.json").write_text("[1]"), "is not a ParNet"),
        (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe"), "config.json is truncated, or no JSON"),
    ],
    ids=lambda v: getattr(v, "__name__", "") if callable(v) else "",
)
def test_folders_that_are_none(damage: Any, message: str, tmp_path: Path) -> None:
    model().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        DeployedParNet.from_pretrained(tmp_path)


def test_places(tmp_path: Path) -> None:
    for name in ("./absent", str(tmp_path / "absent"), "a/b/c"):
        with pytest.raises(FileNotFoundError, match="no folder"):
            ParNet.from_pretrained(name)
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="must be a folder, got the file"):
        model().save_pretrained(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"has no config\.json; it is empty"):
        ParNet.from_pretrained(tmp_path / "empty")


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        ImportError, match=r"no folder user/name, and the Hub needs `pip install parnet-kernels\[hub\]`"
    ):
        ParNet.from_pretrained("user/name")
    with pytest.raises(ImportError, match=r"push_to_hub needs `pip install parnet-kernels\[hub\]`"):
        model().push_to_hub("user/name")


# ------------------------------------------------------------------ the Hub, played


class Errors(SimpleNamespace):
    class HfHubHTTPError(OSError):
        pass

    class EntryNotFoundError(HfHubHTTPError):
        pass

    class LocalEntryNotFoundError(EntryNotFoundError):
        pass

    class HFValidationError(ValueError):
        pass


class Hub:
    """The functions of `huggingface_hub` that are called, with repositories that are folders."""

    errors = Errors

    def __init__(self, root: Path) -> None:
        self.root = root
        self.calls: list[dict[str, Any]] = []

    def HfApi(self, token: Any) -> Any:
        return self

    def create_repo(self, repo_id: str, private: Any, exist_ok: bool) -> Any:
        if repo_id.startswith("other/"):
            raise Errors.HfHubHTTPError("403 Forbidden: not yours\nrequest …")
        (self.root / repo_id).mkdir(parents=True, exist_ok=exist_ok)
        return SimpleNamespace(repo_id=repo_id)

    def file_exists(self, repo: str, name: str, revision: Any) -> bool:
        return (self.root / repo / name).exists()

    def upload_folder(self, repo_id: str, folder_path: str, **options: Any) -> Any:
        self.calls.append(options)
        for path in Path(folder_path).iterdir():
            (self.root / repo_id / path.name).write_bytes(path.read_bytes())
        return SimpleNamespace(commit_url=f"hub/{repo_id}/commit/1")

    def hf_hub_download(self, repo: str, name: str, **options: Any) -> str:
        self.calls.append(options)
        if options["local_files_only"]:
            raise Errors.LocalEntryNotFoundError("not in the cache\nand more")
        if not (self.root / repo).is_dir():
            raise Errors.HfHubHTTPError("404: Repository Not Found\nand more")
        if not (self.root / repo / name).exists():
            raise Errors.EntryNotFoundError("404")
        return str(self.root / repo / name)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(tmp_path / "hub")
    monkeypatch.setitem(sys.modules, "huggingface_hub", made)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", Errors)
    return made


def test_push_and_load(hub: Hub) -> None:
    network = model()
    assert network.push_to_hub("me/net", commit_message="one") == "hub/me/net/commit/1"
    assert hub.calls == [{"revision": None, "commit_message": "one", "create_pr": False}]
    same(ParNet.from_pretrained("me/net", revision="main"), network)
    assert hub.calls[-1]["revision"] == "main"
    assert 'ParNet.from_pretrained("me/net")' in (hub.root / "me" / "net" / "README.md").read_text()
    (hub.root / "me" / "net" / "README.md").write_text("mine")
    network.deploy().push_to_hub("me/net")
    assert (hub.root / "me" / "net" / "README.md").read_text() == "mine"
    same(DeployedParNet.from_pretrained("me/net"), network.deploy())


def test_the_hub_refuses(hub: Hub) -> None:
    with pytest.raises(OSError, match=r"^push_to_hub: other/net: 403 Forbidden: not yours$"):
        model().push_to_hub("other/net")
    with pytest.raises(
        FileNotFoundError, match=r"no folder me/none, and nothing on the Hub: 404: Repository Not Found$"
    ):
        ParNet.from_pretrained("me/none")
    with pytest.raises(FileNotFoundError, match="is neither here nor reached: not in the cache"):
        ParNet.from_pretrained("me/none", local_files_only=True)
    (hub.root / "me" / "bert").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"me/bert was not written by push_to_hub: it has no config\.json"):
        ParNet.from_pretrained("me/bert")


def test_names_of_the_real_library() -> None:
    """What is called is there."""
    library = pytest.importorskip("huggingface_hub")
    import inspect

    from huggingface_hub import errors

    assert {"revision", "cache_dir", "token", "force_download", "local_files_only", "library_name"} <= set(
        inspect.signature(library.hf_hub_download).parameters
    )
    assert {"repo_id", "folder_path", "revision", "commit_message", "create_pr"} <= set(
        inspect.signature(library.HfApi.upload_folder).parameters
    )
    assert {"private", "exist_ok"} <= set(inspect.signature(library.HfApi.create_repo).parameters)
    assert "revision" in inspect.signature(library.HfApi.file_exists).parameters
    assert issubclass(errors.LocalEntryNotFoundError, errors.EntryNotFoundError)
    for name in ("HfHubHTTPError", "HFValidationError"):
        assert issubclass(getattr(errors, name), Exception)
