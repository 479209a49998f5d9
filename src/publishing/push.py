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
from .existing_card import CARD, download_card, is_unedited, lost_sections, pin_revision, pinned_revision, renew_pin
from .export import check_export, write_export


logger = logging.get_logger(__name__)

# Files of an earlier model that `from_pretrained` would find first, add to ours or take for a variant: adapters, templates,
# tokens and weights. And a pickle of its training, which could run code.
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

# Names that git does not take, and full names of refs, which are not branches.
_NO_BRANCH = re.compile(r"^$|^[-/.]|^refs/|[\s~^:?*\[\\\x00-\x1f\x7f]|\.\.|//|/\.|@\{|\.lock(/|$)|[/.]$")

# Errors of the client if the Hub does not answer. HTTPError is that of its HTTP library, which is not always the same.
_NO_ANSWER = (HTTPError, ConnectionError, TimeoutError, LocalEntryNotFoundError, FileMetadataError)


@dataclass
class Publication:
    """
    What a push did.

    Args:
        url (`str`): Address of the commit.
        revision (`str`): Hash of the commit that has weights and code, to load just them.
        kept_card (`bool`): Whether the repo kept its `README.md`, but for the commit in its example, because it was edited
            or tells of training or results that a new one would not.
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
    Uploads what [`export_model`] writes to a repo on the Hub, and makes the repo if needed. Weights and code are one commit;
    the model card follows in a second one, and its example loads the first.

    A card that somebody wrote or edited, in the repo or in the folder `model`, stays as it is, but for the commit in its
    example. A card in the repo also stays if it tells of training or results that a new one would not have, since they may
    be recorded there alone. This holds only if the commit in its example has the weights and config that are pushed, and
    not for results if new `results` are given. A warning names what a new card has lost.

    Args:
        model (`str` or `Path`): Folder or Hub repo of a TA-LLaVA, or of a LLaVA with VMTC and CMAI.
        repo_id (`str`): `"name"`, or `"user/name"`.
        private (`bool`): Make a private repo.
        revision (`str`, *optional*): Branch to upload to. A new branch starts from the main one.
        results (`Sequence`): Results for the card, see [`write_model_card`].
        overwrite_card (`bool`): Write a new card, whatever `model` and the repo have.

    Raises:
        `ValueError`: Before anything is uploaded, if nobody is logged in, the repo or the branch has no possible name, the
            repo may not be written, `model` is no such model or lacks weights, or `private` is asked of a repo that is
            public. Later, if the Hub does not answer or another push changes the repo meanwhile; the same call then does
            the rest.
    """
    _check_names(repo_id, revision)
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
    _check_may_write(api, repo_id, private)

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / name
        write_export(model, processor, files, folder)
        with _hub_errors(repo_id):
            api.create_repo(repo_id, private=private or None, exist_ok=True)
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            upload = _upload_model(api, repo_id, revision, folder)
            card, kept_card = files[CARD], False
            if upload.old_card is not None and not overwrite_card:
                card, kept_card = _choose_card(upload, card, has_results=bool(results))
            card = (renew_pin if kept_card else pin_revision)(card, repo_id, upload.pin)
            _warn_of_old_scores(upload, files)
            if card != upload.old_card:
                api.upload_file(
                    repo_id=repo_id,
                    path_or_fileobj=card.encode(),
                    path_in_repo=CARD,
                    revision=revision,
                    commit_message="Upload model card",
                    parent_commit=upload.commit,
                )
    return Publication(f"{api.endpoint}/{repo_id}/commit/{upload.pin}", upload.pin, kept_card)


# --- before anything is uploaded -----------------------------------------------------------------------------------


def _check_names(repo_id: str, revision: str | None) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"A repo on the Hub cannot be called {repo_id!r}: {one_line(error)}") from error
    if revision is not None and re.fullmatch("[0-9a-f]{40}", revision):
        raise ValueError(f"{revision} is the name of a commit, to which nothing can be added. Name a branch.")
    if revision is not None and _NO_BRANCH.search(revision):
        raise ValueError(f"A branch on the Hub cannot be called {revision!r}.")


def _check_may_write(api: HfApi, repo_id: str, private: bool) -> None:
    with _hub_errors(repo_id):
        if not api.repo_exists(repo_id):
            return
        api.auth_check(repo_id, write=True)
        if private and not api.repo_info(repo_id).private:
            raise ValueError(
                f"{repo_id} is there already, and public. Make it private in its settings, or leave out `private`."
            )


# --- weights and code, the first commit ----------------------------------------------------------------------------


@dataclass
class _Upload:
    """
    The commit that has weights and code.

    Args:
        repo_id (`str`): The repo.
        commit (`str`): Hash of the last commit; an earlier one if nothing had changed.
        is_new (`bool`): Whether anything had changed.
        files (`set[tuple[str, str]]`, *optional*): Path and hash of its files, see [`_list_files`].
        old_card (`str`, *optional*): The repo's card before.
        old_commit (`str`, *optional*): The commit that the example of the old card names.
        old_files (`set[tuple[str, str]]`, *optional*): Path and hash of the files in that commit.
    """

    repo_id: str
    commit: str
    is_new: bool
    files: set[tuple[str, str]] | None
    old_card: str | None
    old_commit: str | None
    old_files: set[tuple[str, str]] | None

    @property
    def pin(self) -> str:
        """The commit to load: the one that the card names already, if it has the same files."""
        if self.old_commit is not None and not self.is_new and self.old_files == self.files:
            return self.old_commit
        return self.commit

    @property
    def is_same_model(self) -> bool:
        """Whether the commit that the old card names has the same weights and config."""
        old = _weights_and_config(self.repo_id, self.old_commit, self.old_files)
        return old is not None and old == _weights_and_config(self.repo_id, self.commit, self.files)


def _upload_model(api: HfApi, repo_id: str, revision: str | None, folder: Path) -> _Upload:
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
    ).oid
    old_commit = None if old_card is None else pinned_revision(old_card, repo_id)
    old_files = None if old_commit is None else _list_files(api, repo_id, old_commit)
    files = _list_files(api, repo_id, commit)
    return _Upload(repo_id, commit, commit != head, files, old_card, old_commit, old_files)


def _list_files(api: HfApi, repo_id: str, revision: str) -> set[tuple[str, str]] | None:
    """Paths and hashes of all files but the card; `None` if there is no such revision."""
    try:
        entries = list(api.list_repo_tree(repo_id, recursive=True, revision=revision))
    except RevisionNotFoundError:
        return None
    return {(entry.path, entry.blob_id) for entry in entries if isinstance(entry, RepoFile) and entry.path != CARD}


def _weights_and_config(repo_id: str, revision: str | None, files: Collection[tuple[str, str]] | None) -> Any:
    """The weights and the config of a commit with these files, without the version of the library that wrote it."""
    if files is None:
        return None
    weights = {(path, blob) for path, blob in files if path.endswith(".safetensors")}
    if "config.json" not in {path for path, _ in files}:
        return weights, None
    config = json.loads(Path(hf_hub_download(repo_id, "config.json", revision=revision)).read_text(encoding="utf-8"))
    config.pop("transformers_version", None)
    return weights, config


# --- the card, the second commit -----------------------------------------------------------------------------------


def _choose_card(upload: _Upload, new_card: str, has_results: bool) -> tuple[str, bool]:
    """The old card of the repo or the new one, and whether it is the old one; see [`push_model`]."""
    old_card = upload.old_card or ""
    lost = lost_sections(old_card, new_card)
    is_same_model = upload.is_same_model
    missed = [title for title in lost if not (has_results and title == "Results")]  # `results` are given anew
    if not is_unedited(old_card) or (missed and is_same_model):
        return old_card, True
    # A new section about another model replaces the old one, which is no loss.
    if lost := [title for title in lost if is_same_model or f"\n## {title}\n" not in new_card]:
        logger.warning(
            f"The {CARD} of {upload.repo_id} is written anew, without what it had under {' and '.join(lost)}; the commits "
            "before have it. --results names evaluations of the model that was pushed now."
        )
    return new_card, False


def _warn_of_old_scores(upload: _Upload, files: Collection[str]) -> None:
    """Warns of scores in the repo that may be those of an earlier model. `files` are those that were uploaded."""
    scores = sorted(path for path, _ in upload.files or () if path.startswith(f"{EVAL_RESULTS_FOLDER}/"))
    if upload.is_new and (others := [path for path in scores if path not in files]):
        logger.warning(
            f"{upload.repo_id} has {others[0]} from before, maybe the score of an earlier model. If so, delete it there."
        )


# --- errors --------------------------------------------------------------------------------------------------------


@contextmanager
def _hub_errors(repo_id: str) -> Iterator[None]:
    """Turns errors of the Hub and of the network into `ValueError`s that say what to do."""
    try:
        yield
    except Exception as error:
        # Errors in the upload of a large file come wrapped.
        cause = error.__cause__ if isinstance(error, RuntimeError) else error
        message = _explain(cause, repo_id)
        if message is None:
            raise
        raise ValueError(message) from error


def _explain(error: BaseException | None, repo_id: str) -> str | None:
    """What an error of the Hub or the network means; `None` for any other."""
    if isinstance(error, LocalTokenNotFoundError):
        return "You are not logged in to the Hub. Run `hf auth login` with a token that may write, or set HF_TOKEN."
    if isinstance(error, GatedRepoError):
        return f"Access to {repo_id} is restricted: ask for it on its page on the Hub."
    if isinstance(error, RepositoryNotFoundError):
        return f"There is no repo {repo_id} on the Hub, or it is private and not yours."
    if isinstance(error, HfHubHTTPError):
        status = getattr(error.response, "status_code", None)
        if status == 401:
            reason = one_line(error)
            return f"The Hub does not accept your token: {reason} Run `hf auth login` with another token, or set HF_TOKEN."
        if status == 403:
            return f"You may not write to {repo_id}: {one_line(error)}"
        if status == 412:
            return f"{repo_id} was changed by another push meanwhile, so this one stopped. Push again."
        return f"The Hub did not take {repo_id}: {one_line(error)}"
    if isinstance(error, _NO_ANSWER):
        return f"The Hub cannot be reached: {one_line(error)}"
    return None
