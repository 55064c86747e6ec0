"""How a failure is told."""


class PrepareError(Exception):
    """A failure the user can act on; its text is `<what is wrong>; <what to do>`."""


def first_line(error: BaseException) -> str:
    """First line of an error's text, or its type's name where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
