"""Sub-packages that are also verbs: ``moe_lens.corpus(...)`` beside ``moe_lens.corpus.text``.

The public verbs ``capture`` and ``corpus`` share their names with the folders that implement them.
Importing a sub-package binds it as an attribute of ``moe_lens``, which would shadow a function of the same
name depending on import order; so the sub-package itself is made callable.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any


class _CallableModule(ModuleType):
    _verb: tuple[str, str]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module, name = self._verb
        return getattr(importlib.import_module(module), name)(*args, **kwargs)


def make_callable(package: str, module: str, name: str) -> None:
    """Let ``package(...)`` call ``module.name(...)``."""
    target = sys.modules[package]
    target.__class__ = _CallableModule
    target._verb = (module, name)  # type: ignore[attr-defined]
