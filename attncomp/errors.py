"""The mistakes a user can make, one exception class each.

Every message answers three questions, in this order: where it happened, what is wrong, and what to do about it.
"Does not apply" is never an exception: passes and variants return a `Rejection` for that.
"""

from __future__ import annotations


class AttncompError(Exception):
    """Base of every exception that attncomp raises on purpose.

    Args:
        what: what is wrong, without a final full stop.
        where: the place, such as ``policy.toml:7`` or ``model.py:build``; None where there is none.
        fix: what the user should do, as a sentence without a final full stop.
    """

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.what = what
        self.where = where
        self.fix = fix
        super().__init__(self.message)

    @property
    def message(self) -> str:
        """The whole text: ``where: what. fix.``"""
        text = self.what if self.where is None else f"{self.where}: {self.what}"
        return text if self.fix is None else f"{text}. {self.fix}."

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only arguments are lost by the default pickling of exceptions, which worker processes need.
        return _rebuild, (type(self), self.what, self.where, self.fix)


class PolicyError(AttncompError):
    """A policy is not valid: an unknown key, a wrong type, an impossible value, or a file that is not TOML."""


class OptionsError(AttncompError):
    """`torch.compile(..., options=...)` holds a key or a value that the backend does not know."""


class CacheError(AttncompError):
    """A request to the cache can't be met: an unknown or ambiguous entry, or a wrong filter."""


class CacheUnusableError(CacheError):
    """The cache directory can't be used: missing, not writable, or owned by someone else (CLI exit code 3)."""


class ExplainError(AttncompError):
    """`attncomp.explain` was given something that it can't analyse."""


class TargetError(AttncompError):
    """A command-line target ``FILE.py:FACTORY`` can't be loaded, or does not return a model and its arguments."""


class HardwareError(AttncompError):
    """A device was named that does not exist on this machine, or that no cost model covers."""


def _rebuild(kind: type[AttncompError], what: str, where: str | None, fix: str | None) -> AttncompError:
    return kind(what, where=where, fix=fix)
