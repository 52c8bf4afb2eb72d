"""The three ways a command ends early, and the exit status of each (DESIGN: 0 done, 2, 75, 1)."""


class UserError(Exception):
    """Bad configuration or input. The message is one line that names the thing. Exit status 2."""

    status = 2


class Interrupted(Exception):
    """Stopped by SIGINT or SIGTERM with its state saved; the same command continues. Exit status 75."""

    status = 75


class RunError(Exception):
    """The run itself failed (NaN, disk full): one line that names the step and what was kept. Exit status 1."""

    status = 1
