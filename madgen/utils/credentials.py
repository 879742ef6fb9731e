"""Find and mask credentials, so that none is recorded, published or logged."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from madgen.utils.errors import UserError

SECRET_NAME = re.compile(r"(?i)SECRET|TOKEN(?!IZER)|PASS|PWD|CREDENTIAL|KEY|SAS|CONNECTION_STRING")
"""Names of environment variables whose values are secrets, unless they are paths."""
MIN_LENGTH = 8
"""Shorter values of such variables are flags, such as `TOKEN=1`."""
PASSWORD = re.compile(r"(?i)\b([a-z][a-z0-9+.-]*:/{1,2})([^\s/?#@:]*:[^\s/?#@]*)@")
"""`user:password@` in a URL."""
LONE_TOKEN = re.compile(r"(?i)\b(https?:/{1,2})([^\s/?#@:]+)@")
"""`token@` in a URL; other protocols have user names there."""
QUERY = re.compile(
    r"(?i)(?<=[?&;])((?:x-(?:amz|goog)-)?(?:signature|credential|security-token)|sig|(?:[a-z]+_)?token"
    r"|api_?key|(?:client_)?secret|password|passwd|awsaccesskeyid)=[^&\s\"'#]+"
)
"""Signatures and tokens in the query of a URL."""


def mask_urls(text: str) -> str:
    """Replace credentials in URLs by `***`."""
    return QUERY.sub(r"\1=***", LONE_TOKEN.sub(r"\1***@", PASSWORD.sub(r"\1***@", text)))


def secret_variables(text: str, variables: Mapping[str, str] = os.environ) -> list[str]:
    """Return the names of the environment variables whose secret values occur in a text."""
    return [
        name
        for name, value in variables.items()
        if len(value) >= MIN_LENGTH and value in text and value[0] not in "/~." and SECRET_NAME.search(name)
    ]


def mask(text: str) -> str:
    """Replace credentials in URLs, and values of secret environment variables, by `***`."""
    for name in secret_variables(text):
        text = text.replace(os.environ[name], "***")
    return mask_urls(text)


def check_no_credentials(key: str, text: str) -> None:
    """Raise UserError, without printing the text, if a setting that is recorded contains credentials."""
    if mask_urls(text) != text:
        raise UserError(
            f"{key} contains a password, token or signature in a URL, and settings are recorded in the dataset; "
            "remove it and set credentials in the environment"
        )
    if names := secret_variables(text):
        raise UserError(
            f"{key} contains the value of the environment variable {names[0]}, and settings are recorded in the "
            "dataset; remove it"
        )
