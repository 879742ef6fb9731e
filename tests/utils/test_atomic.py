import pytest

from madgen.utils.atomic import atomic, write_atomically


def test_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "a"
    with atomic(path) as stream:
        stream.write(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "a"
    write_atomically(path, b"old")
    with pytest.raises(ZeroDivisionError), atomic(path) as stream:
        stream.write(b"half")
        stream.write(b"%d" % (1 // 0))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_concurrent_writers_do_not_mix(tmp_path):
    path = tmp_path / "a"
    with atomic(path) as first:
        first.write(b"first")
        with atomic(path) as second:
            second.write(b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first"
