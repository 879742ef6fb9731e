"""The exception for wrong input, and the errors of storage that a rerun may not meet again."""

import errno

STORAGE_ERRORS = {
    getattr(errno, name)
    for name in (
        "ENOSPC EDQUOT EFBIG EROFS EIO ESTALE EACCES EPERM ENOTCONN ETIMEDOUT EREMOTEIO ESHUTDOWN EMFILE ENFILE "
        "EBUSY ENODEV EHOSTDOWN EHOSTUNREACH ENOLCK ECONNRESET"
    ).split()
    if hasattr(errno, name)  # some exist on Linux alone
}
"""Errors of disks, quotas and file servers."""


class UserError(ValueError):
    """Invalid input. The message is one line with the value, its bound and the fix; the command line exits with 2."""
