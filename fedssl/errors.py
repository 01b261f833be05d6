"""Errors a user can meet. Each says what was given, what would work, and where to change it."""


class FedSSLError(Exception):
    """Base of every error that `fedssl` raises on purpose; `exit_code` is what the command ends with."""

    exit_code = 1


class ConfigError(FedSSLError, ValueError):
    """Bad input: a setting, a file or a combination that cannot work. Nothing was started."""

    exit_code = 2


class DataError(ConfigError):
    """Images or labels that are missing, corrupt or not of the expected layout; the message names the file."""


class PayloadError(FedSSLError, ValueError):
    """A client's upload that the server refuses: wrong shape, dtype, range, round or public set."""


class BrokenProcessError(FedSSLError):
    """This process cannot compute any more: a grid that has others ends it and starts another one."""


class TooFewRepliesError(FedSSLError):
    """A round ended with fewer usable replies than `federation.min_replies`."""

    exit_code = 3
