"""Files past the page cache hold what was written, on file systems with and without such writes."""

import errno
import itertools
import os
import random

import pytest
import xxhash

from fastpref.checkpoint import direct
from fastpref.checkpoint.direct import DirectFile

PAGE = 4096


@pytest.fixture(params=["direct", "refused at open", "refused at write"])
def file_system(request, monkeypatch):
    """Systems that say what they cannot do at once, later, or never."""
    real_open, real_write = os.open, os.write

    def refusing_open(path, flags, mode=0o777):
        if flags & direct.DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real_open(path, flags, mode)

    def refusing_write(descriptor, data):
        if direct.fcntl.fcntl(descriptor, direct.fcntl.F_GETFL) & direct.DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real_write(descriptor, data)

    if request.param == "refused at open":
        monkeypatch.setattr(os, "open", refusing_open)
    if request.param == "refused at write":
        monkeypatch.setattr(os, "write", refusing_write)


@pytest.mark.usefixtures("file_system")
@pytest.mark.parametrize("num_bytes", [0, 1, 2 * PAGE, 4 * PAGE, 4 * PAGE + 1, 12 * PAGE + 77])
def test_bytes_and_digest_are_those_that_were_written(tmp_path, num_bytes, monkeypatch):
    monkeypatch.setattr(direct, "BLOCK_BYTES", 4 * PAGE)
    data = random.Random(num_bytes).randbytes(num_bytes)
    path = tmp_path / "file"
    path.write_bytes(b"an older and longer one" * PAGE)
    with DirectFile(path) as file:
        places = [0, *sorted(random.Random(1).choices(range(num_bytes + 1), k=5)), num_bytes]
        for start, end in itertools.pairwise(places):
            assert file.write(memoryview(data)[start:end]) == end - start
            assert file.tell() == end
    assert path.read_bytes() == data
    assert (file.num_bytes, file.digest()) == (num_bytes, xxhash.xxh3_128_hexdigest(data))


def test_a_system_that_writes_less_than_asked_gets_the_rest_again(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:PAGE]))
    data = random.Random(0).randbytes(5 * PAGE + 5)
    with DirectFile(tmp_path / "file") as file:
        file.write(data)
    assert (tmp_path / "file").read_bytes() == data


def test_a_full_disk_is_said_and_the_file_is_closed(small_disk):
    with pytest.raises(OSError, match="No space left"), DirectFile(small_disk / "file") as file:
        file.write(bytes(3 * 2**20))
    assert file.closed
    file.close()
