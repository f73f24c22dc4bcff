"""Entry point of every Convoy process: makes it independent of the working directory and of
leftovers in the environment.

On import, ``trainer`` and ``pipelines`` are bound to the packages beside this one, whatever else
has these names on ``sys.path``; entries of PYTHONPATH move behind the installed packages, so that
they can add modules but not replace any; warnings are no errors; a loopback address needs no proxy.

Only ``convoy`` and the processes that it starts import this package; programs that use
``trainer`` as a library are left alone.
"""

import os
import sys
import warnings

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def _move_pythonpath_behind_installed_packages() -> None:
    """A ``random.py`` or ``yaml.py`` in a folder of PYTHONPATH must not replace a module that
    Convoy uses.

    The working directory goes altogether, unless Convoy itself is there.
    """
    entries = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    known = {*entries, *map(os.path.abspath, entries)}
    try:
        working_directory = os.getcwd()
    except OSError:  # it was deleted
        working_directory = ""
    dropped = {"", os.curdir, working_directory} - {_ROOT}
    first = [entry for entry in sys.path if entry not in known]
    last = [entry for entry in sys.path if entry in known]
    sys.path[:] = [entry for entry in (*first, *last) if entry not in dropped]


def _bind(name: str) -> None:
    """Load the package ``name`` that lies beside this one, unless it is loaded already."""
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
os.environ["PYTHONSAFEPATH"] = (
    "1"  # of Python processes that this one starts, such as a pool's workers
)
if any(option.startswith("error") for option in sys.warnoptions):
    warnings.resetwarnings()
    os.environ.pop("PYTHONWARNINGS", None)
for _name in ("trainer", "pipelines"):
    _bind(_name)


def main() -> None:
    """The ``convoy`` command."""
    try:
        from pipelines.cli.main import main as command
    except KeyboardInterrupt:
        sys.exit(130)
    command()
