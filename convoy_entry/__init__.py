"""Entry point of every Convoy process; isolates it from the working directory and the environment.

On import:

- ``trainer`` and ``pipelines`` are bound to the packages next to this one, regardless of other
  packages with these names on ``sys.path``.
- Entries of PYTHONPATH move behind the installed packages, so that they can add modules but not
  replace any.
- Warnings that were turned into errors are only warnings again.

Only ``convoy`` and the processes that it starts import this package. Programs that use ``trainer``
as a library are not affected.
"""

import os
import sys
import warnings

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def _move_pythonpath_behind_installed_packages() -> None:
    """Moves entries of PYTHONPATH behind the installed packages on ``sys.path``.

    A ``random.py`` or ``yaml.py`` in such a folder must not replace a module that Convoy uses. The
    working directory is removed, unless Convoy itself is located there.
    """
    entries = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    known = {*entries, *map(os.path.abspath, entries)}
    try:
        working_directory = os.getcwd()
    except OSError:  # the working directory was deleted
        working_directory = ""
    dropped = {"", os.curdir, working_directory} - {_ROOT}
    first = [entry for entry in sys.path if entry not in known]
    last = [entry for entry in sys.path if entry in known]
    sys.path[:] = [entry for entry in (*first, *last) if entry not in dropped]


def _bind(name: str) -> None:
    """Loads the package ``name`` next to this one, unless it is already loaded."""
    import importlib.util

    folder = os.path.join(_ROOT, name)
    spec = importlib.util.spec_from_file_location(
        name, os.path.join(folder, "__init__.py"), submodule_search_locations=[folder]
    )
    if name in sys.modules or spec is None or spec.loader is None:
        return
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


_move_pythonpath_behind_installed_packages()
# For Python processes that this one starts, such as pool workers.
os.environ["PYTHONSAFEPATH"] = "1"
if any(option.startswith("error") for option in sys.warnoptions):
    warnings.resetwarnings()
    os.environ.pop("PYTHONWARNINGS", None)
for _name in ("trainer", "pipelines"):
    _bind(_name)


def main() -> None:
    """Runs the ``convoy`` command."""
    try:
        from pipelines.cli.main import main as command
    except KeyboardInterrupt:
        sys.exit(130)
    command()
