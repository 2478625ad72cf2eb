"""A page to talk to models, served on this machine to its user alone."""

from vlmtune.serve.server import Server, serving
from vlmtune.serve.sides import Side, open_sides

__all__ = ["Server", "Side", "open_sides", "serving"]
