"""Process-wide changes to other packages end with the run, or with their context."""

import json
import logging
import os
import warnings

import pytest

from trainer.dependencies import process_patches


def test_patches_are_undone_in_reverse_order() -> None:
    dumps = json.dumps
    os.environ.pop("CONVOY_A", None)
    process_patches.set_attribute(json, "dumps", str)
    process_patches.set_attribute(json, "dumps", repr)
    process_patches.set_item(os.environ, "CONVOY_A", "1")
    process_patches.set_item(os.environ, "CONVOY_A", "2")
    assert json.dumps is repr
    assert os.environ["CONVOY_A"] == "2"
    process_patches.undo_patches()
    assert json.dumps is dumps
    assert "CONVOY_A" not in os.environ
    process_patches.undo_patches()  # nothing is left to undo
    assert json.dumps is dumps


def test_an_attribute_that_does_not_exist_cannot_be_patched() -> None:
    with pytest.raises(AttributeError, match="no_such_function"):
        process_patches.set_attribute(json, "no_such_function", str)


def test_a_log_level_ends_with_its_context() -> None:
    logger = logging.getLogger("convoy.test")
    logger.setLevel(logging.INFO)
    with process_patches.log_level("convoy.test", logging.CRITICAL):
        assert logger.level == logging.CRITICAL
    assert logger.level == logging.INFO


def test_only_pillows_warnings_are_ignored_and_only_in_the_context() -> None:
    def warn(module: str) -> None:
        warnings.warn_explicit("odd", UserWarning, "file.py", 1, module=module)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with process_patches.pillow_warnings_ignored():
            warn("PIL.Image")
        assert not caught
        with process_patches.pillow_warnings_ignored():
            warn("numpy")
        warn("PIL.Image")
        assert len(caught) == 2
