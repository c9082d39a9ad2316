"""A coreset as a data set on the Hugging Face hub, with a card; nothing becomes public unasked."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from staff.data.locate import DATA_ID

logger = logging.getLogger(__name__)


def check_names(repositories: Iterable[str], public: bool) -> None:
    """See, before any work, that coresets may go into these data sets.

    Raises:
        ValueError: a name that isn't OWNER/NAME, no network, or a public data set without --public.
    """
    for repository in repositories:
        if not DATA_ID.fullmatch(repository):
            raise ValueError(f"--push-to-hub {repository}: give OWNER/NAME, with the owner's name before it")
        _refuse_public(repository, public)


def _refuse_public(repository: str, public: bool) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        is_private = HfApi().repo_info(repository, repo_type="dataset").private
    except RepositoryNotFoundError:
        return
    except Exception as error:  # the network and the hub raise whatever they like
        raise _failure(f"--push-to-hub {repository}: can't ask whether it is public", error) from None
    if not is_private and not public:
        raise ValueError(
            f"--push-to-hub {repository}: this data set is public, and the coreset would be: add --public if "
            "it may be, or name another"
        )


def _failure(what: str, error: Exception) -> ValueError:
    said = " ".join(str(error).split())[:300]
    return ValueError(f"{what} ({said}); log in with `hf auth login` and check the name")


def push(coreset: Path, repository: str, card: str, public: bool = False) -> str:
    """Upload a coreset as train.jsonl, with the user's own login; a card that the data set has stays.

    Args:
        repository: owner/name; made if it is not there, private unless `public`.

    Returns:
        the data set's address.

    Raises:
        ValueError: no login, no network, a name that is taken, or a public data set without `public`.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    hub = HfApi()
    failed = f"{coreset} can't be pushed to {repository}"
    try:
        url = hub.create_repo(repository, repo_type="dataset", private=not public, exist_ok=True)
    except Exception as error:
        raise _failure(failed, error) from None
    _refuse_public(repository, public)  # it may have been there, or have been made public since
    try:
        files = [CommitOperationAdd("train.jsonl", str(coreset))]
        if hub.file_exists(repository, "README.md", repo_type="dataset"):
            logger.warning("%s has a README.md already: it stays as it is", repository)
        else:
            files.append(CommitOperationAdd("README.md", card.encode("utf-8", "replace")))
        said = "Coreset chosen with staff"
        hub.create_commit(repository, files, commit_message=said, repo_type="dataset")
    except Exception as error:
        raise _failure(failed, error) from None
    return str(url)


def card_of(facts: Mapping[str, Any], made_of: Mapping[str, Iterable[str]], licence: str) -> str:
    """A data set's README.md: what was chosen from what, and how.

    Args:
        facts: a manifest.
        made_of: "data", "target" and the like -> names; of a path on this machine the last part is told.
        licence: as the hub names it.
    """
    head = yaml.safe_dump({"license": licence, "tags": ["coreset", "staff"]}, sort_keys=False)
    rate = "" if facts["pruning_rate"] is None else f", pruning rate {facts['pruning_rate']:g}"
    lines = [f"* {name}: {', '.join(map(_public_name, names))}\n" for name, names in made_of.items()]
    return (
        f"---\n{head}---\n\n{facts['m']} of {facts['n']} rows, as they came and in their order, chosen with "
        f"staff {facts['staff']} by the method `{facts['method']}`{rate}, seed {facts['seed']}.\n\n"
        + "".join(lines)
    )


def _public_name(name: str) -> str:
    is_hub = DATA_ID.fullmatch(name) and not Path(name).exists()
    return f"`{(name if is_hub else Path(name).name).replace('`', '')}`"
