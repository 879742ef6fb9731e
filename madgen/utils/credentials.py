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


def secret_variables() -> dict[str, str]:
    """Return the environment variables whose values are secrets."""
    return {
        name: value
        for name, value in os.environ.items()
        if len(value) >= MIN_LENGTH and value[0] not in "/~." and SECRET_NAME.search(name)
    }


def mask(text: str) -> str:
    """Replace credentials in URLs, and values of secret environment variables, by `***`."""
    for secret in secret_variables().values():
        text = text.replace(secret, "***")
    return mask_urls(text)


def check_no_credentials(key: str, text: str, secrets: Mapping[str, str]) -> None:
    """Raise UserError, without printing the text, if a setting that is recorded contains credentials.

    `secrets` are the values of `secret_variables()`.
    """
    if mask_urls(text) != text:
        raise UserError(
            f"{key} contains a password, token or signature in a URL, and settings are recorded in the dataset; "
            "remove it and set credentials in the environment"
        )
    if name := next((name for name, value in secrets.items() if value in text), None):
        raise UserError(
            f"{key} contains the value of the environment variable {name}, and settings are recorded in the "
            "dataset; remove it"
        )
