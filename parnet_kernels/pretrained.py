"""Networks in folders and on the Hugging Face Hub, under the method names that its users know."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, Self


def _hub() -> Any:
    # By name: it stands above the networks, whose files it reads and writes.
    return importlib.import_module("parnet_kernels.hub")


class Pretrained:
    """What both forms of the network have in common with other models of the Hub."""

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> Self:
        """The network in a folder that `save_pretrained` wrote, or in a repository of the Hub; in evaluation mode, on
        the CPU. `DeployedParNet.from_pretrained` takes either form, and folds the training form.

        Args:
            name_or_path: a folder, or the name of a repository ("user/name").
            revision: branch, tag or commit of the repository.
            cache_dir, token, force_download, local_files_only: as in `huggingface_hub.hf_hub_download`.

        Raises:
            FileNotFoundError: there is no such folder or repository, or it cannot be reached.
            CheckpointError: it holds no ParNet, another form, or damaged files.
            ImportError: it is no folder, and `huggingface_hub` is not installed.
        """
        options = {"revision": revision, "cache_dir": cache_dir, "token": token}
        options |= {"force_download": force_download, "local_files_only": local_files_only}
        return _hub().load(cls, name_or_path, options)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `model.safetensors`, as `save` does; `config.json`, which says the same for people and for the Hub;
        and `README.md`, a model card, where there is none.

        Raises:
            OSError: the folder or a file in it cannot be written.
        """
        _hub().save_folder(self, folder)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "A ParNet of parnet_kernels",
        create_pr: bool = False,
    ) -> str:
        """Makes the repository if there is none, and puts there what `save_pretrained` writes, except for a model card
        where there is one.

        Args:
            repo_id: "user/name".
            private: of a new repository; None: as its owner has it by default.
            token, revision, create_pr: as in `huggingface_hub.HfApi.upload_folder`.

        Returns:
            The address of the commit.

        Raises:
            ImportError: `huggingface_hub` is not installed.
            OSError: the Hub refuses, or cannot be reached.
        """
        options = {"revision": revision, "commit_message": commit_message, "create_pr": create_pr}
        return _hub().push(self, repo_id, private, token, options)
