"""The Hugging Face hub: its local cache, and downloads.

A top-level module, because `data` uses it as well: `mobilevit.weights.hub` would import torch and the models.
"""

from __future__ import annotations

import logging
from pathlib import Path

from mobilevit.messages import first_line

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
logger = logging.getLogger(__name__)


class HubError(ValueError):
    """A repository that is not in the cache and could not be downloaded."""


def unreachable() -> str:
    """Why the hub cannot be reached, in a few words; empty if it can.

    Sends one request. The hub's libraries retry for half a minute.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception as error:  # its type depends on the network library
        return f"{constants.ENDPOINT}: {first_line(error)}"
    return ""


def find_model(repo_id: str, revision: str | None, *, download: bool) -> Path:
    """The file of weights of a repository, from the local cache, or downloaded with its config files.

    Raises:
        HubError: not in the cache and not to be downloaded, hub not reachable, no such repository, no weights in it.
    """
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError

    # As plain files: even with local_files_only the download functions may send requests.
    for name in WEIGHT_FILES:
        cached = huggingface_hub.try_to_load_from_cache(repo_id, name, revision=revision)
        if isinstance(cached, str):
            return Path(cached)
    if not download:
        raise HubError(
            f"{repo_id}: no such file or folder, and not in the local cache of the hub; to download it from the hub "
            "use --download (in Python download=True)"
        )
    if reason := unreachable():
        raise HubError(
            f"{repo_id}: not in the local cache, and the hub cannot be reached ({reason}); check the connection, or "
            "download the folder elsewhere and give its path"
        )

    def fetch(name: str) -> Path | None:
        try:
            return Path(huggingface_hub.hf_hub_download(repo_id, name, revision=revision))
        except LocalEntryNotFoundError:  # a subclass of EntryNotFoundError, but it means that the hub did not respond
            raise
        except EntryNotFoundError:
            return None

    library_logger = logging.getLogger("huggingface_hub")
    level = library_logger.level
    library_logger.setLevel(logging.ERROR)  # it logs every retry
    try:
        # The small files first: if the weights are in the cache, so are the files that describe them.
        for name in ("config.json", "preprocessor_config.json"):
            fetch(name)
        path = fetch(WEIGHT_FILES[0]) or fetch(WEIGHT_FILES[1])
    except RepositoryNotFoundError:
        raise HubError(f"{repo_id}: no such model on the hub, or no access to it; check the name") from None
    except Exception as error:  # its type depends on the network library
        reason = "the hub cannot be reached" if isinstance(error, LocalEntryNotFoundError) else first_line(error)
        raise HubError(
            f"{repo_id}: could not be downloaded ({reason}); try again later, or download the folder elsewhere and "
            "give its path"
        ) from None
    finally:
        library_logger.setLevel(level)
    if path is None:
        raise HubError(f"{repo_id}: contains neither {' nor '.join(WEIGHT_FILES)}; check that it is a MobileViT")
    license = "weights by Apple under Apple's license" if repo_id.startswith(("apple/", "timm/")) else "see its license"
    logger.info("%s: downloaded; %s, on its model card", repo_id, license)
    return path
