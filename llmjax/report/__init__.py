"""Self-contained HTML reports, written from the files of a run."""

from llmjax.report.page import write_report

__all__ = ["write_report"]
