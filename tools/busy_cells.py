"""A pytest plugin beside nbval: a cell that says it was too busy to judge is reported as skipped, for that reason."""

from __future__ import annotations

import pytest

from minilib.book.notebook import TOO_BUSY


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    reason = said(getattr(item, "test_outputs", None) or [])
    if call.when == "call" and report.passed and reason:
        report.outcome = "skipped"
        report.longrepr = (str(item.path), 0, f"Skipped: {reason}")
    return report


def said(outputs: list) -> str:
    """What a cell's outputs say of a machine that was too busy; empty if they do not."""
    texts = [output.get("data", {}).get("text/plain", "") for output in outputs]
    return next((text for text in texts if text.startswith(TOO_BUSY)), "")
