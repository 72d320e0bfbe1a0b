"""A ``torch.compile`` backend that finds attention, proves its mask, and generates the cheapest kernel for it.

``torch.compile(model, backend="attncomp")`` needs no import of this package: torch finds the backend by its entry
point. Everything public is loaded on first use (PEP 562), so that ``import attncomp`` costs no ``import torch`` and the
command line starts fast.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attncomp.errors import AttncompError
    from attncomp.explain import explain
    from attncomp.policy import Policy, load_policy
    from attncomp.report import Report, reports

__version__ = "0.1.0"

__all__ = ["AttncompError", "Policy", "Report", "__version__", "explain", "load_policy", "reports"]

_HOME = {
    "AttncompError": "attncomp.errors",
    "Policy": "attncomp.policy",
    "Report": "attncomp.report",
    "load_policy": "attncomp.policy",
    "reports": "attncomp.report",
}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# Hidden from type checkers, which see the real names above and report a misspelt one.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        home = _HOME.get(name)
        if home is None:
            raise AttributeError(f"module 'attncomp' has no attribute {name!r}; public names: {', '.join(__all__)}")
        value = globals()[name] = getattr(import_module(home), name)
        return value

    class _Package(ModuleType):
        """Keeps ``attncomp.explain`` the function.

        The function lives in a module of the same name, and Python's import system binds a submodule over its package's
        attribute whenever the submodule is first imported. A data descriptor on the package's type outranks that.
        """

        @property
        def explain(self) -> object:
            return import_module("attncomp.explain").explain

        @explain.setter
        def explain(self, value: object) -> None:
            if not isinstance(value, ModuleType):
                raise AttributeError("attncomp.explain is read-only")

    sys.modules[__name__].__class__ = _Package
