"""Files of repositories on Hugging Face's hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

__all__ = ["first_of_hub"]


def first_of_hub(hub_id: str, names: Sequence[str]) -> Path:
    """Return the local path of the first of these files that a repository has, downloaded unless it is in the cache.

    Args:
        hub_id: the repository, ORG/NAME.
        names: the files' names, preferred ones first.

    Raises:
        FileNotFoundError: the repository can be reached and has none of them.
        Exception: huggingface_hub's own, if the repository cannot be reached or may not be read.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    unreachable: LocalEntryNotFoundError | None = None
    for name in names:
        try:
            return Path(hf_hub_download(hub_id, name))
        except LocalEntryNotFoundError as error:  # without a network, another of the files may be in the cache
            unreachable = unreachable or error
        except EntryNotFoundError:
            continue
    if unreachable is not None:
        raise unreachable
    raise FileNotFoundError(
        f"a repository on the hub must have {' or '.join(names)}, got {hub_id} without; download its file of weights "
        "and pass that"
    )
