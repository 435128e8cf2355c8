"""The one error a user's mistake may raise: a single line that names what is wrong and how to mend it."""


class UserError(Exception):
    """A mistake in a config, a file or a combination of settings.

    The command line prints the message without a stack trace and exits with code 2.
    """

    reported = False
    """Whether another process prints it."""
