"""What the user is told when something is wrong: two errors of one line each, safe to print whatever file they quote."""

LONGEST = 4000  # characters of a message


def one_line(message) -> str:
    """Text for a terminal: what cannot be printed is escaped, the middle of a long message left out."""
    text, half = str(message), LONGEST // 2
    text = text if len(text) <= LONGEST else f"{text[:half]} ... {text[-half:]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class UsageError(ValueError):
    """The user asked for something that cannot be done: one line saying which key or file, what was found, what was expected."""

    def __init__(self, message=""):
        super().__init__(one_line(message))


class NotFiniteError(UsageError):
    """What a model computed is not finite: it has diverged, while others of the same command may not have."""


class JobError(RuntimeError):
    """The job cannot go on, through no mistake in its command: one line saying what happened, what is kept and what to do."""

    def __init__(self, message=""):
        super().__init__(one_line(message))


def shown(value) -> str:
    """A value for a message; not all have a repr: integers of thousands of digits, lists nested without end."""
    try:
        return repr(value)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} too large to show"
