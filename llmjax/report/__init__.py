"""One HTML page that tells a run from its files; opens anywhere, loads nothing."""

from llmjax.report.page import write_report

__all__ = ["write_report"]
