"""The Hugging Face hub: whether it can be reached."""

from __future__ import annotations


def unreachable() -> str:
    """Why the hub cannot be reached, in a few words; empty if it can.

    One request tells. The libraries of the hub repeat theirs for half a minute before they give up.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception as error:  # of the network, whatever library it goes through
        return f"{constants.ENDPOINT}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    return ""
