"""A log file gives back what was written and whole records only, wherever it was torn and whatever was damaged."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilib.classic.log.file import HEADER, MAX_RECORD, LogCorrupt, LogFile, LogInUse

RECORDS = [b"first", b"", b"the last one"]


def written(path, records, fsync=False):
    """A log of these records, closed; returns where each ends."""
    log, ends = LogFile(path, fsync), []
    for record in records:
        log.write(log.pack(record))
        ends.append(log.size)
    log.close()
    return ends


def everything(log):
    log.check_invariants()
    return [log.read(index) for index in range(len(log))]


def test_what_was_written_is_there_when_it_is_opened_again(tmp_path):
    records = [b"", b"x", bytes(range(256)) * 4096, memoryview(b"view"), bytearray(b"array")]
    ends = written(tmp_path / "log", records)
    log = LogFile(tmp_path / "log")
    assert everything(log) == [bytes(record) for record in records] and log.torn_bytes == 0
    assert log.size == ends[-1] == sum(len(record) + HEADER.size for record in records)
    assert b"".join(log.stored_from(2)) == (tmp_path / "log").read_bytes()[ends[1] :]
    with pytest.raises(IndexError, match="has 5 records, and no record 5"):
        log.read(5)
    log.close()


def test_a_torn_record_is_cut_off_wherever_it_was_torn(tmp_path):
    path = tmp_path / "log"
    ends = written(path, RECORDS)
    whole = path.read_bytes()
    for size in range(ends[-2], ends[-1]):
        path.write_bytes(whole[:size])
        log = LogFile(path)
        assert everything(log) == RECORDS[:-1] and log.torn_bytes == size - ends[-2]
        log.write(log.pack(RECORDS[-1]))
        log.close()
        assert path.read_bytes() == whole


def test_damage_never_passes_for_a_record(tmp_path):
    path = tmp_path / "log"
    ends = written(path, RECORDS)
    whole = path.read_bytes()
    for at in range(len(whole)):
        for bit in range(8):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
            intact = sum(end <= at for end in ends)
            try:
                log = LogFile(path)
            except LogCorrupt as damage:
                assert f"record {intact} is damaged" in str(damage)
            else:
                assert everything(log) == RECORDS[:intact] and log.torn_bytes > 0
                log.close()
    path.write_bytes(whole[:6] + b"?" + whole[7:])  # the CRC of the first
    with pytest.raises(LogCorrupt, match="record 0 is damaged"):
        LogFile(path)


@settings(max_examples=50)
@given(st.lists(st.binary(max_size=40), max_size=8), st.data())
def test_a_stream_is_taken_in_whatever_pieces_it_comes(tmp_path_factory, records, data):
    folder = tmp_path_factory.mktemp("stream")
    written(folder / "source", records)
    stream, buffer = (folder / "source").read_bytes(), bytearray()
    log = LogFile(folder / "copy")
    while stream:
        piece = data.draw(st.integers(1, len(stream)))
        buffer, stream = buffer + stream[:piece], stream[piece:]
        while batch := log.take(buffer):
            log.write(batch)
    assert everything(log) == records and not buffer
    log.close()


def test_a_record_that_is_missing_or_comes_twice_is_noticed(tmp_path):
    ends = written(tmp_path / "source", RECORDS)
    stored = (tmp_path / "source").read_bytes()
    first, rest = stored[: ends[0]], stored[ends[1] :]
    for stream in (first + rest, first + first):
        log, buffer = LogFile(tmp_path / "copy"), bytearray(stream)
        assert log.take(buffer).stored == first  # the good one first
        buffer[:0] = first
        log.write(log.take(buffer))
        with pytest.raises(LogCorrupt, match="record 1 is damaged, or out of turn"):
            log.take(buffer)
        log.close()
        (tmp_path / "copy").unlink()


def test_logs_are_compared_by_one_number(tmp_path):
    written(tmp_path / "a", RECORDS)
    written(tmp_path / "b", [b"FIRST", *RECORDS[1:]])
    a, b = LogFile(tmp_path / "a"), LogFile(tmp_path / "b")
    assert a.begins_with(3, a.crc) and a.begins_with(0, 0)
    assert not a.begins_with(3, b.crc) and not a.begins_with(4, a.crc) and not a.begins_with(0, a.crc)
    a.close()
    b.close()


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path):
    class FullDisk:
        """Takes three bytes, then no more."""

        def __init__(self, file):
            self.file, self.room = file, 3

        def write(self, data):
            if not self.room:
                raise OSError(28, "No space left on device")
            took, self.room = self.file.write(data[: self.room]), 0
            return took

        def __getattr__(self, name):
            return getattr(self.file, name)

    log = LogFile(tmp_path / "log")
    log.write(log.pack(b"before"))
    log._file = FullDisk(log._file)
    with pytest.raises(OSError, match="No space left"):
        log.write(log.pack(b"too much"))
    log._file = log._file.file
    assert everything(log) == [b"before"]
    log.write(log.pack(b"after"))
    assert everything(log) == [b"before", b"after"]
    log.close()


def test_the_disk_is_asked_to_confirm_each_write(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("os.fsync", asked.append)
    written(tmp_path / "log", RECORDS)
    assert asked == []
    written(tmp_path / "other", RECORDS, fsync=True)
    assert len(asked) == len(RECORDS) + 2  # when it is opened, the file and the folder that has its name


def test_what_cannot_be_logged_is_refused(tmp_path):
    log = LogFile(tmp_path / "log")
    with pytest.raises(LogInUse, match="log is open already"):
        LogFile(tmp_path / "log")
    with pytest.raises(TypeError, match="a record is bytes, got str"):
        log.pack("text")
    with pytest.raises(ValueError, match="at most 67108864 bytes, got 67108865"):
        log.pack(bytes(MAX_RECORD + 1))
    log.close()
    LogFile(tmp_path / "log").close()
