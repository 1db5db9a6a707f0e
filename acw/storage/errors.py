"""Errors that a user can act on."""

from __future__ import annotations


class UserError(ValueError):
    """Something that the user can mend. The message is one line that names the thing and the remedy; exit status 2."""


class Damaged(UserError):
    """A file whose bytes are not those that were written."""
