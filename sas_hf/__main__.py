"""`python -m sas_hf` is the command `sas-hf`."""

from .cli import app


if __name__ == "__main__":
    app()
