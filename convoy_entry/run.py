"""Calls ``main`` of a module of this Convoy installation: ``python -P run.py MODULE argument ...``.

The module is found next to this file, not where Python would look up its name.
"""

import importlib.util
import os
import sys


def _load_entry() -> None:
    folder = os.path.dirname(os.path.abspath(__file__))
    spec = importlib.util.spec_from_file_location(
        "convoy_entry", os.path.join(folder, "__init__.py"), submodule_search_locations=[folder]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["convoy_entry"] = module
    spec.loader.exec_module(module)


_load_entry()  # at import, so that it runs in pool workers as well

if __name__ == "__main__":
    sys.argv.pop(0)
    sys.exit(importlib.import_module(sys.argv[0]).main())
