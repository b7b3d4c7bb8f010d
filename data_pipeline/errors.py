"""The one error type for what a user can mend."""


class UserError(ValueError):
    """Bad input, missing data, a damaged file: the message says what was expected, what came, where, and what to do.

    Commands print the message alone and exit with code 2; any other exception is our own bug and keeps its traceback.
    """
