"""Publishes models on the Hugging Face Hub."""

import json
import re
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, RepoFile, hf_hub_download
from huggingface_hub.constants import EVAL_RESULTS_FOLDER
from huggingface_hub.errors import (
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from transformers.utils import logging

from ..common.errors import one_line
from ..common.loading import config_of
from ..common.sources import check_source
from .export import check_export, write_export
from .model_card import CARD, download_card, is_unedited, lost_sections, pin_revision, pinned_revision, renew_pin


logger = logging.get_logger(__name__)

# What an earlier model in the repo may have left, and `from_pretrained` would find first, add to ours or take for a variant:
# adapters, templates and tokens, weights. And a pickle of its training, which could run code.
_STALE = [
    "adapter_config.json",
    "added_tokens.json",
    "additional_chat_templates/*",
    "chat_template.json",
    "special_tokens_map.json",
    "training_args.bin",
    *(
        pattern.format(*weights)
        for weights in (
            ("model", "safetensors"),
            ("pytorch_model", "bin"),
            ("adapter_model", "safetensors"),
            ("adapter_model", "bin"),
        )
        for pattern in ("{}.{}", "{}.*.{}", "{}-?????-of-?????.{}", "{}-?????-of-?????.*.{}", "{}.{}.index*.json")
    ),
]

# What git does not take, and full names of refs, which are no branches.
_NO_BRANCH = re.compile(r"^$|^[-/.]|^refs/|[\s~^:?*\[\\\x00-\x1f\x7f]|\.\.|//|/\.|@\{|\.lock(/|$)|[/.]$")

# What the client raises where the Hub does not answer; HTTPError is that of the HTTP library, which is not always the same.
_NO_ANSWER = (HTTPError, ConnectionError, TimeoutError, LocalEntryNotFoundError, FileMetadataError)


@dataclass
class Publication:
    """
    Args:
        url (`str`): Of the commit.
        revision (`str`): Hash of the commit that has weights and code, to load just them.
        kept_card (`bool`): Whether the repo's `README.md` was left as it is, but for the commit that its example names: it
            was edited, or tells of training or results that a new one would not.
    """

    url: str
    revision: str
    kept_card: bool


def push_model(
    model: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    results: Sequence[str | Path] = (),
    overwrite_card: bool = False,
) -> Publication:
    """
    Uploads what [`export_model`] writes to a repo on the Hub, which is made if it is not there. Weights and code are one
    commit; the model card follows in a second one, and its example loads the first.

    A card that somebody wrote or edited, in the repo or in the folder `model`, stays as it is, but for the commit in its
    example. So does one in the repo with training or results that a new one would not have, which may be recorded there
    alone, unless these are given as `results`, if the commit in its example has the weights and config that are pushed: of
    others, what it tells is no longer true. What a new one has lost is warned of.

    Args:
        model (`str` or `Path`): Folder or Hub repo of a TA-LLaVA, or of a LLaVA with VMTC and CMAI.
        repo_id (`str`): `"name"`, or `"user/name"`.
        private (`bool`): Make a private repo.
        revision (`str`, *optional*): Branch to upload to, which is made from the main one if it is not there.
        results (`Sequence`): For the card, see [`write_model_card`].
        overwrite_card (`bool`): Write a new card, whatever `model` and the repo have.

    Raises:
        `ValueError`: Before anything is uploaded, if nobody is logged in, the repo or the branch has no possible name, the
            repo may not be written, `model` is no such model or lacks weights, or `private` is asked of a repo that is
            public. Later, if the Hub does not answer or another push changes the repo meanwhile; the same call then does
            the rest.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"A repo on the Hub cannot be called {repo_id!r}: {one_line(error)}") from error
    if revision is not None and re.fullmatch("[0-9a-f]{40}", revision):
        raise ValueError(f"{revision} is the name of a commit, to which nothing can be added. Name a branch.")
    if revision is not None and _NO_BRANCH.search(revision):
        raise ValueError(f"A branch on the Hub cannot be called {revision!r}.")
    check_source(model)
    if Path(model).exists():
        config_of(model)  # before anybody has to log in
    api = HfApi()
    with _hub_errors(repo_id):
        user = api.whoami()["name"]
    if "/" not in repo_id:
        repo_id = f"{user}/{repo_id}"
    name = repo_id.rpartition("/")[2]
    processor, files = check_export(model, name, results, overwrite_card)
    new_card = files[CARD]

    with _hub_errors(repo_id):
        if api.repo_exists(repo_id):
            api.auth_check(repo_id, write=True)
            if private and not api.repo_info(repo_id).private:
                raise ValueError(
                    f"{repo_id} is there already, and public. Make it private in its settings, or leave out `private`."
                )

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / name
        write_export(model, processor, files, folder)
        with _hub_errors(repo_id):
            api.create_repo(repo_id, private=private or None, exist_ok=True)
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            head = api.repo_info(repo_id, revision=revision).sha
            old_card = download_card(repo_id, head)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=revision,
                commit_message="Upload model",
                ignore_patterns=[CARD],
                delete_patterns=_STALE,
                parent_commit=head,
            )
            earlier = None if old_card is None else pinned_revision(old_card, repo_id)
            before = None if earlier is None else _list_files(api, repo_id, earlier)
            after = _list_files(api, repo_id, commit.oid)
            # All was there, maybe since the revision that the card names.
            pin = earlier if earlier is not None and commit.oid == head and before == after else commit.oid
            card, kept_card = pin_revision(new_card, repo_id, pin), False
            if old_card is not None and not overwrite_card:
                lost = lost_sections(old_card, new_card)
                pinned = _of_model(repo_id, earlier, before)
                same_model = pinned is not None and pinned == _of_model(repo_id, commit.oid, after)
                missed = [title for title in lost if not (results and title == "Results")]  # which are given anew
                kept_card = not is_unedited(old_card) or (bool(missed) and same_model)
                if kept_card:
                    card = renew_pin(old_card, repo_id, pin)
                # Of another model a new section in place of the old one is no loss.
                elif lost := [title for title in lost if same_model or f"\n## {title}\n" not in new_card]:
                    logger.warning(
                        f"The {CARD} of {repo_id} is written anew, without what it had under {' and '.join(lost)}; the "
                        "commits before have it. --results names evaluations of the model that was pushed now."
                    )
            scores = sorted(path for path, _ in after or () if path.startswith(f"{EVAL_RESULTS_FOLDER}/"))
            if commit.oid != head and (others := [path for path in scores if path not in files]):
                logger.warning(
                    f"{repo_id} has {others[0]} from before, maybe the score of an earlier model. If so, delete it there."
                )
            if card != old_card:
                api.upload_file(
                    repo_id=repo_id,
                    path_or_fileobj=card.encode(),
                    path_in_repo=CARD,
                    revision=revision,
                    commit_message="Upload model card",
                    parent_commit=commit.oid,
                )
    return Publication(f"{api.endpoint}/{repo_id}/commit/{pin}", pin, kept_card)


def _list_files(api: HfApi, repo_id: str, revision: str) -> set[tuple[str, str]] | None:
    """Names and hashes of all files but the card; `None` for a revision that is not there."""
    try:
        entries = list(api.list_repo_tree(repo_id, recursive=True, revision=revision))
    except RevisionNotFoundError:
        return None
    return {(entry.path, entry.blob_id) for entry in entries if isinstance(entry, RepoFile) and entry.path != CARD}


def _of_model(repo_id: str, revision: str | None, files: Collection[tuple[str, str]] | None) -> Any:
    """The weights of a commit with these files and its config, but for the version of the library that wrote it."""
    if files is None:
        return None
    weights = {(path, blob) for path, blob in files if path.endswith(".safetensors")}
    if "config.json" not in {path for path, _ in files}:
        return weights, None
    config = json.loads(Path(hf_hub_download(repo_id, "config.json", revision=revision)).read_text(encoding="utf-8"))
    config.pop("transformers_version", None)
    return weights, config


@contextmanager
def _hub_errors(repo_id: str) -> Iterator[None]:
    """The Hub's errors, and those of the network, as `ValueError`s that say what to do."""
    try:
        yield
    except Exception as error:
        # What goes wrong in the upload of a large file comes wrapped.
        cause = error.__cause__ if isinstance(error, RuntimeError) else error
        message = _explain(cause, repo_id)
        if message is None:
            raise
        raise ValueError(message) from error


def _explain(error: BaseException | None, repo_id: str) -> str | None:
    """What an error of the Hub or the network means; `None` for any other."""
    if isinstance(error, LocalTokenNotFoundError):
        return "You are not logged in to the Hub. Run `hf auth login`, with a token that may write, or set HF_TOKEN."
    if isinstance(error, GatedRepoError):
        return f"Access to {repo_id} is restricted: ask for it on its page on the Hub."
    if isinstance(error, RepositoryNotFoundError):
        return f"There is no repo {repo_id} on the Hub, or it is private and not yours."
    if isinstance(error, HfHubHTTPError):
        status = getattr(error.response, "status_code", None)
        if status == 401:
            reason = one_line(error)
            return f"The Hub does not accept your token: {reason} Run `hf auth login` with another, or set HF_TOKEN."
        if status == 403:
            return f"You may not write to {repo_id}: {one_line(error)}"
        if status == 412:
            return f"{repo_id} was changed by another push meanwhile, so this one stopped. Push again."
        return f"The Hub did not take {repo_id}: {one_line(error)}"
    if isinstance(error, _NO_ANSWER):
        return f"The Hub cannot be reached: {one_line(error)}"
    return None
