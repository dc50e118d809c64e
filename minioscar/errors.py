"""The two ways a command can end badly; the command line turns them into one line on stderr and an exit code."""


class UserError(Exception):
    """Wrong use or wrong input (exit code 2): the message names the thing, the reason and the way out, in one line."""


class Failure(Exception):
    """The work itself failed (exit code 1): a download that broke off, a card that ran out of memory."""
