# SPDX-License-Identifier: Apache-2.0
"""Files on the Hugging Face hub by address: hf://user/name[@revision][/file]."""
import re
import urllib.parse
from pathlib import Path

from dnnlib.errors import UserError
from dnnlib.util import first_line

SCHEME = "hf://"
WEIGHTS_FILE = "model.safetensors"      # What an address without a file means; `export.py --format=hub` writes it.
REMEDIES = {                            # Class of the hub's library -> what helps.
    "RepositoryNotFoundError": "there is no such model, or it is private: check the name, or log in (hf auth login)",
    "GatedRepoError": "its owner must grant access: ask on its page, then log in (hf auth login)",
    "RevisionNotFoundError": "there is no such revision: name a branch, a tag or a commit of this model",
    "RemoteEntryNotFoundError": "it has no such file: name one that it has, as hf://user/name/file",
    "LocalEntryNotFoundError": "no copy is on this machine, and the hub was not asked or not reached: connect, and "
                               "unset STYLESAN_OFFLINE and HF_HUB_OFFLINE, or give the path of a file",
}

#----------------------------------------------------------------------------

def is_hub_address(text: str) -> bool:
    """Whether a text is an address on the hub."""
    return text.startswith(SCHEME)


def hub_file(address: str, offline: bool) -> Path:
    """A file on the hub, in the cache of the hub's own library, which fetches it at most once per revision.

    Args:
        address: hf://user/name, hf://user/name@revision, hf://user/name@revision/file. A slash in a revision is %2F.
        offline: Only take what was downloaded before.

    Raises:
        UserError: no such address; no such model, revision or file; the hub is not to be had.
    """
    match = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(?:@([^@/\s]+))?(?:/([^\s].*))?", address)
    if match is None:
        raise UserError(f"{address}: expected an address such as hf://user/name, hf://user/name@revision or "
                        "hf://user/name/file.pkl")
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as err:
        raise UserError(f"{address}: the package huggingface_hub is missing or broken ({first_line(err)}): "
                        "pip install huggingface_hub, or download the file and give its path") from err
    revision = None if match[2] is None else urllib.parse.unquote(match[2])
    try:
        return Path(hf_hub_download(match[1], match[3] or WEIGHTS_FILE, revision=revision, local_files_only=offline))
    except Exception as err:    # Errors of its HTTP library, which is another one in each version, may be among them.
        known = next((REMEDIES[kind.__name__] for kind in type(err).__mro__ if kind.__name__ in REMEDIES), None)
        raise UserError(f"{address}: {known or f'{first_line(err)}: check the address and the connection'}") from err
