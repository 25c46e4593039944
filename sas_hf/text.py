"""Real English text that every CPython brings along, so that examples and checks need neither files nor a network."""

from pydoc_data.topics import topics


def python_reference() -> str:
    """The Python language reference as `help()` shows it: about 460,000 characters of technical English."""
    return "\n\n".join(topics[name].strip() for name in sorted(topics))
