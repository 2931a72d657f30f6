"""Cells: whose warnings end in their notes."""

from __future__ import annotations

import logging
import threading

import pytest

from medssl.pipelines.cells import _listening


def test_a_cell_keeps_its_own_warnings_and_not_those_of_other_threads(
    caplog: pytest.LogCaptureFixture,
):
    log = logging.getLogger("medssl.tracking")
    other = threading.Thread(target=lambda: log.warning("the server is away"))
    with _listening() as warnings:
        log.warning("few patients")
        log.info("fine")
        other.start()
        other.join()
    assert warnings == ["few patients"]
    assert [record.getMessage() for record in caplog.records] == ["the server is away"]
    log.warning("after")
    assert warnings == ["few patients"]
