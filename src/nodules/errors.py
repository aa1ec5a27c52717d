"""What a user can do wrong, said in one line."""


class InputError(ValueError):
    """Input that cannot be used. The message is one line: which file or name, what is wrong, what to do."""


class NotebookFailed(RuntimeError):
    """A cell raised, timed out, or lost its kernel. The message names the cell and ends with the error."""
