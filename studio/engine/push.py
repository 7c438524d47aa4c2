"""`push`: an export goes to the Hugging Face hub or to ModelScope, into a private repository unless asked otherwise.

Who pushes is told by the environment (HF_TOKEN, MODELSCOPE_API_TOKEN) or an earlier login of the hub's own tool; tokens
are neither asked for, nor stored, nor shown.
"""

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from studio.data.talk import GATE_FILE, WEIGHTS_FILE
from studio.engine.job import JobContext
from studio.errors import StudioError

KEPT_HERE = [WEIGHTS_FILE, "*.zip"]
"""Not pushed: what names folders of this machine, and what holds the other files a second time."""
FORBIDDEN = (401, 403)


def run(job: JobContext) -> dict[str, Any]:
    """Args: export (its folder), hub (huggingface or modelscope), repo (owner/name), public, despite_gate.

    Raises StudioError for a folder that is no export, for one that failed its gate, and for what the hub refuses.
    """
    args = job.args
    folder, repo, hub = Path(args["export"]), str(args["repo"]), str(args["hub"])
    if hub not in HUBS:
        raise StudioError(f"There is no hub named {hub!r}.", f"Allowed: {', '.join(HUBS)}.")
    require_passed(folder, bool(args.get("despite_gate")))
    job.phase("uploading")
    url = HUBS[hub](folder, repo, bool(args.get("public")))
    return {"url": url, "repo": repo, "hub": hub, "public": bool(args.get("public"))}


def require_passed(folder: Path, despite_gate: bool = False) -> None:
    """Raise StudioError for a folder without a gate.json, or one that failed."""
    try:
        gate = json.loads((folder / GATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StudioError(
            f"{str(folder)!r} is not an export: its {GATE_FILE} cannot be read.", "Make one with `retune export`."
        ) from error
    if not gate.get("passed") and not despite_gate:
        raise StudioError(
            f"{folder.name!r} failed its gate: {gate.get('message', '')}",
            "Export it again in another format, or push it all the same with --despite-gate.",
        )


def to_huggingface(folder: Path, repo: str, public: bool) -> str:
    """Create the repository where it is not there, and upload; returns its address."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError

    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise StudioError("HF_HUB_OFFLINE forbids uploading.", "Unset HF_HUB_OFFLINE.")
    if not get_token():
        raise StudioError("Nobody is logged in to Hugging Face.", "Set HF_TOKEN, or run `hf auth login`.")
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    try:
        api.create_repo(repo, private=not public, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, ignore_patterns=KEPT_HERE, commit_message="Retune Studio")
    except HFValidationError as error:
        raise StudioError(f"{repo!r} does not name a repository.", "It looks like owner/name.") from error
    except HfHubHTTPError as error:
        raise _refused("Hugging Face", repo, error.response.status_code, str(error)) from error
    except (HTTPError, OSError) as error:
        raise StudioError(f"Hugging Face cannot be reached: {error}.", "HF_ENDPOINT chooses a mirror.") from error
    return f"{api.endpoint}/{repo}"


def to_modelscope(folder: Path, repo: str, public: bool) -> str:
    """As to_huggingface. Raises StudioError where the package is not installed."""
    if importlib.util.find_spec("modelscope_hub") is None:
        raise StudioError(
            "Pushing to ModelScope needs the package `modelscope`, which is not installed.",
            'Install it with `pip install "retune[modelscope]"` and try again.',
        )
    from modelscope_hub import HubApi

    api = HubApi(token=os.environ.get("MODELSCOPE_API_TOKEN"))
    try:
        if not api.repo_exists(repo, "model"):
            api.create_repo(repo, "model", visibility="public" if public else "private")
        api.upload_folder(repo, "model", folder, ignore_patterns=KEPT_HERE, commit_message="Retune Studio")
    except Exception as error:  # the package has a tree of its own; a person needs the cause
        reason = " ".join(str(error).split())[:300]
        raise StudioError(
            f"Nothing was uploaded to {repo!r} on ModelScope: {type(error).__name__}: {reason}.",
            "Look whether modelscope.cn can be reached, and set MODELSCOPE_API_TOKEN.",
        ) from error
    return f"https://modelscope.cn/models/{repo}"


def _refused(hub: str, repo: str, status: int, reason: str) -> StudioError:
    if status in FORBIDDEN:
        return StudioError(
            f"{hub} does not let you write to {repo!r} (status {status}).",
            "Use a token that may write there, and your own name before the slash.",
        )
    return StudioError(f"{hub} refuses {repo!r} (status {status}): {reason[:300]}.", "Try again later.")


HUBS: dict[str, Callable[[Path, str, bool], str]] = {"huggingface": to_huggingface, "modelscope": to_modelscope}
