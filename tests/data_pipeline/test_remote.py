"""Files behind URLs come whole and unaltered from a server that fails, or not at all, with a message."""

import hashlib
import io
import itertools
import json
import multiprocessing
import pickle
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import h5py
import numpy as np
import pytest
from faulty_server import FaultyServer

from data_pipeline.errors import UserError
from data_pipeline.remote import RangesUnsupported, RemoteFile, RemoteFolder, Retries, is_url
from data_pipeline.transport import transport

QUICK = Retries(attempts=3, first_wait_seconds=0.01, timeout_seconds=0.5)
CONTENT = np.random.default_rng(0).bytes(700_001)
ALWAYS = float("inf")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FaultyServer]:
    folder = tmp_path / "served"
    (folder / "sub" / "deeper").mkdir(parents=True)
    (folder / "sub" / "file.bin").write_bytes(CONTENT)
    (folder / "sub" / "with space & ü.bin").write_bytes(b"odd")
    (folder / "sub" / "empty").write_bytes(b"")
    with FaultyServer(folder) as server:
        yield server


def remote(server: FaultyServer, name: str = "file.bin", retries: Retries = QUICK) -> RemoteFile:
    return (RemoteFolder(server.url, retries) / "sub").file(name)


@pytest.mark.parametrize(
    ("location", "answer"),
    [
        ("https://host/path", True),
        ("s3://bucket/x", True),
        ("pipe:cat /etc/passwd", True),
        ("simplecache::https://host/x", True),
        ("file:///etc/passwd", True),
        (Path("https://host/path"), True),
        ("plain/path", False),
        (Path("/plain/path"), False),
        ("run:1/shards", False),
        ("./odd:/x", False),
    ],
)
def test_urls_are_told_from_local_paths(location: str | Path, answer: bool) -> None:
    assert is_url(location) is answer


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("pipe:cat /etc/passwd", "expected a local path or a URL that starts with http://, https://"),
        ("file:///etc/passwd", "nothing else is opened"),
        ("ssh://host/x", "nothing else is opened"),
        ("https:/host/x", "nothing else is opened"),
        ("simplecache::https://host/x", "nothing else is opened"),
        ("https://host/x::file:///etc", "nothing else is opened"),
        ("https://", "expected https://HOST/PATH"),
        ("https://host/a?token=1", r"without '\?'"),
        ("https://a host/b", "expected https://HOST/PATH"),
        ("https://host/a/../b", "without '..'"),
        ("https://host/a/%2e%2e/b", "without '..'"),
        ("https://host//b", "empty parts"),
        ("https://user:secret@host/..", r"https://\*\*\*@host/"),
    ],
)
def test_what_is_refused_as_a_url(url: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as refusal:
        RemoteFolder(url)
    assert "secret" not in str(refusal.value)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/etc/passwd", "a?b", "a#b", "%2e%2e", "a\\b", "a\n", "a::b"])
def test_names_are_plain(name: str) -> None:
    folder = RemoteFolder("https://host/path/")
    assert (folder / "sub").file("x.tar").url == "https://host/path/sub/x.tar"
    for follow in (folder.file, folder.__truediv__):
        with pytest.raises(UserError, match="expected a plain file name"):
            follow(name)


def test_secrets_are_not_shown() -> None:
    folder = RemoteFolder("https://user:secret@127.0.0.1:9/path", Retries(1, 0.0, 0.2))
    with pytest.raises(UserError, match="failed 1 times") as failure:
        folder.file("x").size()
    assert "secret" not in f"{folder} {folder!r} {failure.value} {failure.value.__cause__}"
    assert "secret" in pickle.loads(pickle.dumps(folder)).url


def test_reads(server: FaultyServer) -> None:
    file = remote(server)
    assert file.size() == len(CONTENT)
    assert file.exists()
    assert not remote(server, "missing").exists()
    assert file.read(len(CONTENT)) == CONTENT
    assert file.read_range(100_000, 100_007) == CONTENT[100_000:100_007]
    assert file.read_range(0, len(CONTENT)) == CONTENT
    assert remote(server, "with space & ü.bin").read(10) == b"odd"
    assert remote(server, "empty").read(0) == b""
    assert remote(server).name == "file.bin"


def test_a_range_fetches_no_more_than_it_returns(server: FaultyServer) -> None:
    assert remote(server).read_range(5, 1005) == CONTENT[5:1005]
    assert remote(server).read_range(7, 7) == b""
    assert (server.total_requests, server.total_sent) == (1, 1000)


def test_names_of_a_folder(server: FaultyServer) -> None:
    folder = RemoteFolder(server.url, QUICK)
    assert folder.names() == ["sub"]
    assert (folder / "sub").names() == ["deeper", "empty", "file.bin", "with space & ü.bin"]
    with pytest.raises(UserError, match=r"file\.bin: expected a page that lists the folder, got application"):
        RemoteFolder(f"{server.url}/sub/file.bin").names()


def test_links_of_a_page_lead_nowhere_else(server: FaultyServer) -> None:
    """A folder's page is the server's: names from it are checked like any other."""
    page = (
        "<a href='/etc/passwd'></a><a href='http://other/sub/x'></a><a href='..%2f..%2fx'></a><a href='http://[x'></a>"
    )
    (server.folder / "evil").write_text(page)
    server.fail("folder", "html")
    assert RemoteFolder(f"{server.url}/folder", QUICK).names() == []
    from data_pipeline.transport import _children

    names = _children(page, "http://host/sub/")
    assert names == {"../../x"}
    with pytest.raises(UserError, match=r"expected a plain file name, got '\.\./\.\./x'"):
        RemoteFolder("http://host/sub").file(names.pop())


@pytest.mark.parametrize("kind", ["drop", "truncate", "html", "500", "503", "429"])
def test_a_failure_that_passes_is_not_noticed(server: FaultyServer, kind: str) -> None:
    server.fail("sub/file.bin", kind, times=2)
    assert remote(server).read_range(1000, 90_000) == CONTENT[1000:90_000]
    assert server.requests["sub/file.bin"] == 3


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("drop", "failed 3 times, the last time: ClientPayloadError"),
        ("truncate", "the last time: 44500 bytes came where 89000 were asked for"),
        ("html", "a page of HTML came instead of bytes 1000 to 90000"),
        ("500", "the server answers 500"),
    ],
)
def test_a_failure_that_stays_is_the_users(server: FaultyServer, kind: str, message: str) -> None:
    server.fail("sub/file.bin", kind, times=ALWAYS)
    with pytest.raises(UserError, match=rf"sub/file\.bin: .*{message}"):
        remote(server).read_range(1000, 90_000)
    assert server.requests["sub/file.bin"] == 3


@pytest.mark.parametrize(
    ("kind", "message"),
    [("404", "no such file on the server"), ("403", "open to you"), ("401", "open to you"), ("400", "answers 400")],
)
def test_a_refusal_is_not_repeated(server: FaultyServer, kind: str, message: str) -> None:
    server.fail("sub/file.bin", kind, times=ALWAYS)
    with pytest.raises(UserError, match=message):
        remote(server).read_range(0, 10)
    assert server.requests["sub/file.bin"] == 1


def test_a_url_that_cannot_be() -> None:
    for host in ("127.0.0.1:port", "127.0.0.1:99999", "a" * 70):
        with pytest.raises(UserError, match="cannot be opened"):
            RemoteFile(f"http://{host}/x", QUICK).size()


def test_a_server_that_hangs(server: FaultyServer) -> None:
    quick = Retries(attempts=2, first_wait_seconds=0.01, timeout_seconds=0.1)
    server.fail("sub/file.bin", "slow", times=1, seconds=0.5)
    assert remote(server, retries=quick).read_range(0, 10) == CONTENT[:10]
    server.fail("sub/file.bin", "slow", times=ALWAYS, seconds=0.5)
    with pytest.raises(UserError, match=r"failed 2 times, the last time: no answer within 0\.1 s"):
        remote(server, retries=quick).read_range(0, 10)


def test_a_server_that_is_gone(server: FaultyServer) -> None:
    file = remote(server)
    server.__exit__(None, None, None)
    with pytest.raises(UserError, match=r"failed 3 times.*check the address and the server"):
        file.size()
    server.__init__(server.folder)  # so that the fixture can close it
    server.__enter__()


def test_no_ranges(server: FaultyServer) -> None:
    """The whole file is not read to find out; once may be an accident."""
    big = server.folder / "sub" / "big"
    with big.open("wb") as file:
        file.truncate(64 * 2**20)
    server.fail("sub/big", "no_range", times=1)
    assert remote(server, "big").read_range(10, 20) == bytes(10)
    server.fail("sub/big", "no_range", times=ALWAYS)
    with pytest.raises(RangesUnsupported, match=r"`sampling\.shuffle: blocks`"):
        remote(server, "big").read_range(10, 20)
    assert server.sent["sub/big"] < 3 * 8 * 2**20
    with pytest.raises(RangesUnsupported):
        remote(server, "big", Retries(attempts=1)).read_range(10, 20)


def test_beyond_the_end(server: FaultyServer) -> None:
    size = len(CONTENT)
    for start, stop in ((size - 10, size + 1), (size + 5, size + 6)):
        with pytest.raises(
            UserError, match=f"expected bytes {start} to {stop}, but the file on the server holds {size}"
        ):
            remote(server).read_range(start, stop)
    with pytest.raises(UserError, match="expected at most 1000 bytes, got more"):
        remote(server).read(1000)


def test_size_without_head(server: FaultyServer) -> None:
    server.fail("sub/file.bin", "405", times=ALWAYS, method="HEAD")
    assert remote(server).size() == len(CONTENT)
    assert server.total_sent <= 1  # the connection may be closed before the one byte asked for is sent


@pytest.mark.parametrize("fault", ["", "drop", "truncate", "html", "500", "no_range"])
def test_fetch_goes_on_where_it_stopped(server: FaultyServer, tmp_path: Path, fault: str) -> None:
    path = tmp_path / "copy"
    path.write_bytes(CONTENT[:400_000])
    if fault:
        server.fail("sub/file.bin", fault)
    arrived: list[int] = []
    remote(server).fetch(path, len(CONTENT), arrived.append)
    assert path.read_bytes() == CONTENT
    assert sum(arrived) == len(CONTENT) - 400_000
    if fault in ("", "500", "html", "truncate"):
        assert server.ranges[0] == ("sub/file.bin", "bytes=400000-700000")
    if fault in ("", "500"):
        assert server.sent["sub/file.bin"] == len(CONTENT) - 400_000


def test_fetch_outlasts_more_drops_than_attempts(server: FaultyServer, tmp_path: Path) -> None:
    """A large file is worn down: a drop half way through the rest, eight times, with four attempts allowed."""
    server.fail("sub/file.bin", "drop", times=8)
    remote(server, retries=Retries(4, 0.01, 5)).fetch(tmp_path / "copy", None, lambda num_bytes: None)
    assert (tmp_path / "copy").read_bytes() == CONTENT
    assert server.requests["sub/file.bin"] == 9


def test_fetch_gives_up(server: FaultyServer, tmp_path: Path) -> None:
    path = tmp_path / "copy"
    server.fail("sub/file.bin", "500", first=2, times=ALWAYS)
    server.fail("sub/file.bin", "drop", times=1)
    with pytest.raises(UserError, match="failed 3 times, the last time: the server answers 500"):
        remote(server).fetch(path, None, lambda num_bytes: None)
    held = path.stat().st_size
    assert 0 < held < len(CONTENT)  # kept for the next time
    server.heal()
    server.reset()
    remote(server).fetch(path, None, lambda num_bytes: None)
    assert path.read_bytes() == CONTENT
    assert server.total_sent == len(CONTENT) - held


def test_fetch_of_another_size(server: FaultyServer, tmp_path: Path) -> None:
    for expected in (len(CONTENT) - 1, len(CONTENT) + 1):
        with pytest.raises(UserError, match=f"the server announces {len(CONTENT)} bytes where {expected} are expected"):
            remote(server).fetch(tmp_path / "copy", expected, lambda num_bytes: None)
    (tmp_path / "copy").write_bytes(
        bytes(len(CONTENT) + 1)
    )  # of something else, or the server tells the size of a page
    with pytest.raises(UserError, match=f"says {len(CONTENT)} bytes, but .*copy holds {len(CONTENT) + 1} already"):
        remote(server).fetch(tmp_path / "copy", None, lambda num_bytes: None)
    assert (tmp_path / "copy").stat().st_size == len(CONTENT) + 1


def test_many_threads(server: FaultyServer) -> None:
    server.fail("sub/file.bin", "drop", first=10, times=5)
    server.fail("sub/file.bin", "503", first=40, times=5)
    starts = np.random.default_rng(1).integers(0, len(CONTENT) - 5000, 200).tolist()
    patient = Retries(attempts=8, first_wait_seconds=0.01, timeout_seconds=5)
    with ThreadPoolExecutor(16) as pool:
        pieces = pool.map(lambda start: remote(server, retries=patient).read_range(start, start + 5000), starts)
        assert list(pieces) == [CONTENT[start : start + 5000] for start in starts]


def test_threads_that_come_first_together_share_connections() -> None:
    everyone, unused = Barrier(16), itertools.count(1000)
    interval = sys.getswitchinterval()

    def connect(timeout_seconds: int) -> object:
        everyone.wait(30)
        return transport("http", timeout_seconds)

    try:
        sys.setswitchinterval(1e-6)
        with ThreadPoolExecutor(16) as pool:
            for timeout_seconds in itertools.islice(unused, 20):
                assert len(set(pool.map(connect, [timeout_seconds] * 16))) == 1
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_across_processes(server: FaultyServer, method: str) -> None:
    """A file that was read here is read in a child, which shares no connection, and here again."""
    file = remote(server)
    assert file.read_range(0, 9) == CONTENT[:9]
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.apply(file.read_range, (1, 10)) == CONTENT[1:10]
    assert file.read_range(2, 11) == CONTENT[2:11]


def test_open(server: FaultyServer) -> None:
    with remote(server).open() as file:
        assert file.seek(0, io.SEEK_END) == len(CONTENT)
        file.seek(-10, io.SEEK_CUR)
        assert file.read() == CONTENT[-10:]
        file.seek(3)
        assert file.read(5) == CONTENT[3:8]
        assert file.tell() == 8
    assert server.total_requests == 1  # of one block


def test_open_as_hdf5_keeps_a_bounded_number_of_blocks(server: FaultyServer) -> None:
    values = np.random.default_rng(2).random((48, 2**17))  # 48 MiB, more than the cache
    with h5py.File(server.folder / "sub" / "big.hdf5", "w") as file:
        file["values"] = values
    with remote(server, "big.hdf5").open() as stream, h5py.File(stream, "r") as file:
        for row in (0, 47, 3):
            assert np.array_equal(file["values"][row], values[row])
        assert server.total_sent < 8 * 2**20
        assert np.array_equal(file["values"][:], values)
        for row in range(48):
            file["values"][row]
        assert len(stream._blocks) <= stream.NUM_BLOCKS  # type: ignore[attr-defined]


@pytest.mark.parametrize(("scheme", "extra"), [("s3", "wavelit-fm[s3]"), ("gs", "wavelit-fm[gcs]")])
def test_missing_package_of_a_store(scheme: str, extra: str) -> None:
    """In a process of its own that has no such package, whatever is installed here."""
    program = f"""
import sys
sys.modules["s3fs"] = sys.modules["gcsfs"] = None
from data_pipeline.remote import RemoteFolder
from data_pipeline.errors import UserError
try:
    RemoteFolder("{scheme}://bucket/shards").file("manifest.json").size()
except UserError as error:
    print(error)
"""
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert f"run: pip install '{extra}'" in said


def test_a_store_goes_by_the_same_calls(tmp_path: Path) -> None:
    """fsspec's own store in memory stands in for s3, gs and hf: the methods that those have, too."""
    import fsspec

    from data_pipeline.transport import Missing, _Store

    fsspec.filesystem("memory").pipe({"/bucket/a/file.bin": CONTENT, "/bucket/a/sub/x": b"x"})
    store, url = _Store("memory"), "memory://bucket/a/file.bin"
    assert store.size(url) == len(CONTENT)
    assert store.read_range(url, 5, 10) == CONTENT[5:10]
    assert b"".join(store.chunks(url, 0, None)) == CONTENT
    assert b"".join(store.chunks(url, 5, len(CONTENT))) == CONTENT[5:]
    assert store.names("memory://bucket/a") == {"file.bin", "sub"}
    with pytest.raises(Missing, match="no such file in the store"):
        store.size("memory://bucket/b")
    with pytest.raises(UserError, match=f"but the file on the server holds {len(CONTENT)}"):
        store.read_range(url, 5, len(CONTENT) + 5)


def test_hf_needs_no_extra() -> None:
    from data_pipeline.transport import _Store

    assert _Store("hf")._fs.protocol == "hf"


def test_reading_is_what_the_server_holds(server: FaultyServer, tmp_path: Path) -> None:
    """Against another client: the same bytes as Python's own."""
    from urllib.request import urlopen

    with urlopen(f"{server.url}/sub/file.bin") as response:
        theirs = response.read()
    remote(server).fetch(tmp_path / "copy", None, lambda num_bytes: None)
    ours = (tmp_path / "copy").read_bytes()
    assert hashlib.sha256(ours).hexdigest() == hashlib.sha256(theirs).hexdigest()
    assert json.dumps(len(ours)) == json.dumps(len(CONTENT))


def test_bytes_from_another_place_are_never_taken(server: FaultyServer, tmp_path: Path) -> None:
    """Nothing but the header tells: there are as many bytes as were asked for."""
    file = remote(server)
    server.fail("sub/file.bin", "shift", times=2)
    assert file.read_range(1000, 3000) == CONTENT[1000:3000]
    (tmp_path / "part").write_bytes(CONTENT[:1000])
    server.heal()
    server.fail("sub/file.bin", "shift", times=1)
    file.fetch(tmp_path / "part", len(CONTENT), lambda count: None)
    assert (tmp_path / "part").read_bytes() == CONTENT
    server.fail("sub/file.bin", "shift", times=ALWAYS)
    with pytest.raises(UserError, match="bytes from 1001 on came where those from 1000 on were asked for"):
        file.read_range(1000, 3000)


def test_content_that_a_check_refuses_is_fetched_again(server: FaultyServer) -> None:
    def check(content: bytes) -> str | None:
        return None if CONTENT.endswith(content) else "not the end of the file"

    server.fail("sub/file.bin", "corrupt", times=1)
    assert remote(server).read_range(700_000, 700_001, check) == CONTENT[-1:]
    server.fail("sub/file.bin", "corrupt", times=1)
    assert remote(server).read(10**6, check) == CONTENT
    with pytest.raises(UserError, match="failed 3 times, the last time: not the end of the file"):
        remote(server).read_range(0, 10, check)
