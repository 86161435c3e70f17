"""The packages of the extra `curate` are required."""

import importlib.util

import pytest

from llmjax.curate import packages
from llmjax.errors import UserError


def test_the_error_names_the_missing_package(monkeypatch):
    packages.check_installed()
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ftfy" else find(name))
    with pytest.raises(UserError, match=r"needs ftfy: run `pip install 'llmjax\[curate\]'`"):
        packages.check_installed()
