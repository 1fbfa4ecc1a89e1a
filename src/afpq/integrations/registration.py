# SPDX-License-Identifier: MIT
"""Registers the plug-in with Transformers as soon as Transformers is imported, and imports neither before.

`import afpq` would take four seconds if it imported Transformers to register with it; `afpq --help` needs no model. So
the registration waits for the module that it goes into.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

PLUGIN = "afpq.integrations.transformers"
TABLE = "transformers.quantizers"  # the package in which Transformers keeps its methods
MODELS = "transformers.modeling_utils"  # imports TABLE, and must be whole before the plug-in imports it


def register_when_imported() -> None:
    """Register with Transformers now if it is there, or else right after it is imported; call once."""
    if MODELS in sys.modules or TABLE in sys.modules:
        import_module(PLUGIN)
    else:
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport(MetaPathFinder):
    """Finds modules as everybody does, and imports the plug-in behind TABLE or MODELS, whichever is whole first.

    TABLE is imported while MODELS is: then the plug-in waits for MODELS. If a module of afpq imports them, the plug-in
    waits for the outermost such module: it imports most of afpq, and would find half a module.
    """

    def __init__(self) -> None:
        self.inside = 0  # modules of afpq that are being imported
        self.due = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        ours = fullname.startswith("afpq.")
        if not (ours or fullname in (TABLE, MODELS)) or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        try:
            spec = find_spec(fullname)
        finally:
            sys.meta_path.insert(0, self)
        if spec is None or spec.loader is None or spec.origin is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            self.inside += ours
            try:
                run(module)
            finally:
                self.inside -= ours
            self.due |= fullname == MODELS or (fullname == TABLE and MODELS not in sys.modules)
            if self.due and not self.inside and self in sys.meta_path:
                sys.meta_path.remove(self)
                import_module(PLUGIN)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
