"""What error messages of the tooling share."""


def one_line(error: BaseException) -> str:
    """The text of an error without its line breaks, shortened; its kind, if it has no text."""
    return " ".join(str(error).split())[:500] or type(error).__name__
