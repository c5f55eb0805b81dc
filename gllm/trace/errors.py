"""The one error of this package."""


class TraceError(ValueError):
    """A trace or an option that cannot be used; its message is one line for the user to act on."""
