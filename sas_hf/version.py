"""The one place that states the version, and what a report says of versions."""

from importlib.metadata import version


__version__ = "0.1.0"
"""Of this package."""


def versions(*packages: str) -> dict[str, str]:
    """Of these packages, and of those that every number depends on; for reports."""
    found = {name: version(name) for name in (*packages, "transformers", "torch")}
    return found | {"sas_hf": __version__}
