"""The two kinds of errors that a person is told in one line; whatever else is raised is a bug and shows its traceback."""


class UserError(ValueError):
    """A mistake in what a person gave us (config, data, checkpoint): got, expected, do this. Exit code 2."""


class RunError(RuntimeError):
    """What went wrong on the way although config and data are good. Exit code 1."""
