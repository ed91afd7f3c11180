"""What can go wrong, said once."""


class EcifError(ValueError):
    """Bad input or a computation that cannot be trusted.

    The message is one or two sentences for the user: what is wrong, the
    offending value, and the remedy.
    """
