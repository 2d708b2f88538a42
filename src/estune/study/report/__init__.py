"""One self-contained HTML page about finished or unfinished runs: for people, offline, without a server."""

from estune.study.report.page import write_report

__all__ = ["write_report"]
