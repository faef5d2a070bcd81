"""`ctrl-csc`, whose commands lie in `ctrl_csc_cli`, a module that starts without this package."""

from ctrl_csc_cli import app

__all__ = ["app"]
