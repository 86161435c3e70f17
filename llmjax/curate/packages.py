"""The packages of the extra `curate`, which only `llmjax curate` needs."""

import importlib.util

from llmjax.errors import UserError

_PACKAGE_OF_MODULE = {
    "trafilatura": "trafilatura",
    "lxml_html_clean": "lxml_html_clean",
    "brotli": "brotli",
    "charset_normalizer": "charset-normalizer",
    "ftfy": "ftfy",
    "py3langid": "py3langid",
}


def check_installed() -> None:
    """Raise UserError with the names of missing packages and the command that installs them."""
    if missing := [name for module, name in _PACKAGE_OF_MODULE.items() if importlib.util.find_spec(module) is None]:
        raise UserError(f"llmjax curate needs {', '.join(missing)}: run `pip install 'llmjax[curate]'`")
