"""How does a command fail? With a message for a person."""


class CommandError(Exception):
    """What came, what is needed and what to do next; the command line prints it and exits 1."""
