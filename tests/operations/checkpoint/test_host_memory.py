"""The files of one rank in its host's memory, while a save goes on beside whoever asks."""

from pathlib import Path

from minilib.operations.checkpoint.format.folder import part_name
from minilib.operations.checkpoint.host_memory import HostMemory


def test_bytes_are_counted_while_a_save_gives_a_listed_file_its_name(tmp_path, monkeypatch):
    memory = HostMemory(tmp_path)
    memory.write(part_name(1, 0), b"own")
    memory.begin(part_name(1, 1))
    memory.extend(part_name(1, 1), b"copied")
    stat, finished = Path.stat, []

    def finishes_first(path, **options):
        if not finished:
            finished.append(True)
            memory.finish(part_name(1, 1))
        return stat(path, **options)

    monkeypatch.setattr(Path, "glob", lambda folder, pattern: sorted(folder.iterdir(), reverse=True))
    monkeypatch.setattr(Path, "stat", finishes_first)
    assert memory.nbytes == len(b"own") + len(b"copied") and finished


def test_what_a_killed_process_left_unfinished_is_removed(tmp_path):
    HostMemory(tmp_path).begin(part_name(1, 0))
    assert HostMemory(tmp_path).nbytes == 0 and not list(tmp_path.iterdir())
