"""The base of all errors that a user can mend: every message names the thing, what was found, what is accepted, what helps."""


class UserError(Exception):
    """Commands print the message, without a traceback, and exit with status 2."""
