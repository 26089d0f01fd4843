import logging

import pytest

from pipelines.runtime import logs
from pipelines.runtime.errors import InputError
from pipelines.runtime.logs import job_logging, log_format, log_level, mark_lines


def test_lines_are_text_unless_asked_for(monkeypatch):
    monkeypatch.delenv("SHOAL_LOG_FORMAT", raising=False)
    assert log_format() == "text"
    assert job_logging() is None


def test_json_lines_are_rays(monkeypatch):
    monkeypatch.setenv("SHOAL_LOG_FORMAT", "json")
    monkeypatch.setenv("SHOAL_LOG_LEVEL", "warning")
    found = job_logging()
    assert (found.encoding, found.log_level) == ("JSON", "WARNING")


def test_unknown_format_and_level_are_errors(monkeypatch):
    monkeypatch.setenv("SHOAL_LOG_FORMAT", "xml")
    with pytest.raises(InputError, match="must be text or json"):
        log_format()
    monkeypatch.setenv("SHOAL_LOG_LEVEL", "loud")
    with pytest.raises(InputError, match="SHOAL_LOG_LEVEL is 'LOUD'"):
        log_level()


@pytest.fixture
def unmarked(monkeypatch):
    """This process's lines as they are before any run; afterwards again."""
    factory = logging.getLogRecordFactory()
    monkeypatch.setattr(logs, "_run", None)
    yield
    logging.setLogRecordFactory(factory)


@pytest.mark.usefixtures("unmarked")
def test_marked_lines_name_job_and_run(caplog):
    mark_lines("embed_corpus", "abc123")
    mark_lines("embed_corpus", "abc123")
    logging.getLogger("somewhere").warning("hello")
    logging.getLogger("somewhere").warning("of another", extra={"shard": "s1"})
    assert [(r.job, r.run_id) for r in caplog.records] == [("embed_corpus", "abc123")] * 2
    assert caplog.records[1].shard == "s1"


@pytest.mark.usefixtures("unmarked")
def test_the_run_is_known_also_when_another_makes_the_records():
    mark_lines("embed_corpus", "abc123")
    ours = logging.getLogRecordFactory()
    logging.setLogRecordFactory(lambda *args, **kwargs: ours(*args, **kwargs))  # as Ray's import
    assert logs.current_run() == ("embed_corpus", "abc123")


def test_people_are_not_told_of_every_unit(monkeypatch):
    monkeypatch.delenv("SHOAL_LOG_FORMAT", raising=False)
    logger = logging.getLogger(logs.UNIT_LINES)
    before = logger.level
    try:
        logger.setLevel(logging.NOTSET)
        logs.configure_logging()
        assert not logger.isEnabledFor(logging.INFO)
        assert logger.isEnabledFor(logging.WARNING)
    finally:
        logger.setLevel(before)
