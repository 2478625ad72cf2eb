"""Whether an error means that the hub can't be reached, whatever HTTP package its library is built on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def http() -> ModuleType:
    """The HTTP package of the installed huggingface_hub: its own errors are a kind of that package's."""
    from huggingface_hub.errors import HfHubHTTPError

    base = next(cls for cls in HfHubHTTPError.__mro__[1:] if not cls.__module__.startswith("huggingface_hub"))
    return sys.modules[base.__module__.partition(".")[0]]


def unreachable(error: BaseException) -> bool:
    """True where the hub was not reached, or has been switched off by HF_HUB_OFFLINE."""
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    package = http()
    names = ("TransportError", "ConnectionError", "Timeout")  # httpx has the first, requests the others
    kinds = [getattr(package, name) for name in names if hasattr(package, name)]
    offline = (ConnectionError, LocalEntryNotFoundError, OfflineModeIsEnabled, *kinds)
    return any(isinstance(cause, offline) for cause in chain(error))
