"""One folder, one commit, one repository of the hub.

huggingface_hub speaks with it and finds the token (HF_TOKEN, or its login) by itself: none passes through here. `create_commit` is
used rather than `upload_folder`, which with Xet commits a large folder in several pieces: here all of it is there or nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.errors import HTTPError as NetworkError

from qlora_suite.tracking import say

WEIGHTS = ("adapter_config.json", "config.json")
Kind = Literal["model", "space"]


def push(folder: Path, repo: str, kind: Kind, public: bool, message: str) -> str:
    """Create the repository if it is not there, commit the folder to it, return its address.

    Raises ValueError if the hub refuses, cannot be reached, or has something else under that name.
    """
    if get_token() is None:
        raise ValueError("there is no token of the hub; set HF_TOKEN to one with write access, or log in with `hf auth login`")
    api, names = HfApi(), sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    with clear_refusals(repo, api.endpoint):
        url = api.create_repo(repo, repo_type=kind, private=not public, exist_ok=True, space_sdk="gradio" if kind == "space" else None)
        there = api.repo_info(repo, repo_type=kind)
        if not public and not there.private:
            raise ValueError(f"{url} is there already and everybody can read it; agree with --public, or give another --repo")
        others = sorted({file.rfilename for file in there.siblings or []} - {*names, ".gitattributes"})
        if clash := [name for name in others if name in WEIGHTS or name.endswith((".safetensors", ".bin", ".gguf"))]:
            raise ValueError(
                f"{url} already holds {', '.join(clash[:3])}, which would stand beside what is published now and be loaded in its "
                "place or with it; give another --repo, or delete it there first"
            )
        if others:
            say(f"left as they are in {repo}: {', '.join(others)}")
        files = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in names]
        api.create_commit(repo, files, commit_message=message, repo_type=kind)
    return str(url)


@contextmanager
def clear_refusals(repo: str, endpoint: str) -> Iterator[None]:
    """What the hub and the network answer, as one sentence that says what to do. Nothing is committed by halves."""
    try:
        yield
    except OfflineModeIsEnabled:
        raise ValueError("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it, or add --dry-run") from None
    except HfHubHTTPError as error:
        raise ValueError(_refusal(error, repo, endpoint)) from error
    except (NetworkError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not isinstance(error.__cause__, NetworkError | OSError):
            raise  # not the network's; uploads of large files wrap it
        reason = error.__cause__ if isinstance(error, RuntimeError) else error
        if isinstance(reason, HfHubHTTPError):
            raise ValueError(_refusal(reason, repo, endpoint)) from error
        raise ValueError(
            f"the connection to {endpoint} broke ({type(reason).__name__}: {str(reason) or 'no more is known'}); nothing was committed. "
            "The same command again takes up where it was"
        ) from error


def _refusal(error: HfHubHTTPError, repo: str, endpoint: str) -> str:
    status, said = error.response.status_code, (error.server_message or "").strip().splitlines()[:1]
    why = f" ({said[0]})" if said else ""
    if status == 401:
        return f"{endpoint} does not know the token{why}; make one with write access in its settings and set HF_TOKEN, or `hf auth login`"
    if status == 403:
        return f"the token may not write to {repo}{why}; it needs write access to {repo.partition('/')[0]}; give another --repo or token"
    if status == 402:
        return f"{endpoint} wants this kind of repository paid for{why}; choose another hardware, or leave --space out"
    if status == 404 or isinstance(error, RepositoryNotFoundError):
        return f"there is no {repo} of this kind, or the token may not see it{why}; is it a repository of another type? Give another --repo"
    if status == 409:
        return f"{repo} is in another state than expected{why}: another type of that name, or a commit at the same moment; try again"
    if status >= 500 or status == 429:
        return f"{endpoint} cannot take it now (HTTP {status}){why}; nothing was committed, the same command again later"
    return f"{endpoint} refused (HTTP {status}){why}; nothing was committed"
