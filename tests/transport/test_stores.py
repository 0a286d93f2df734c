"""Every store keeps the same promises, against real servers."""

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

import pytest
from transport.servers import REDIS, needs_redis, redis_server, s3_server

from vllm_kvcompress.transport.stores import Store, StoreError, open_store
from vllm_kvcompress.transport.stores.interface import Reason
from vllm_kvcompress.transport.stores.local import LocalStore
from vllm_kvcompress.transport.stores.objects import ObjectStore
from vllm_kvcompress.transport.stores.redis_server import RedisStore
from vllm_kvcompress.transport.stores.throttle import ThrottledStore

MANY = 1 << 20


@pytest.fixture(scope="module")
def s3_bucket() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch, s3_server(patch) as url:
        yield url


@pytest.fixture(params=["file", "redis", "s3"])
def store_url(request, tmp_path) -> Iterator[str]:
    if request.param == "file":
        yield f"file://{tmp_path}/kv"
    elif request.param == "redis":
        if REDIS is None:
            pytest.skip("no redis-server here: apt-get install redis-server")
        with redis_server(tmp_path) as (url, _):
            yield url
    else:
        yield f"{request.getfixturevalue('s3_bucket')}/{tmp_path.name}"


@pytest.fixture
def store(store_url) -> Iterator[Store]:
    opened = open_store(store_url)
    yield opened
    opened.close()


def test_what_is_put_is_what_is_got(store, store_url):
    data = os.urandom(300_000)
    assert store.get("a/one", MANY) is None
    store.put("a/one", data)
    assert store.get("a/one", MANY) == data
    store.put("a/one", b"other")
    assert store.get("a/one", MANY) == b"other"
    assert store.has(["a/one", "a/two", "b/one"]) == [True, False, False]
    again = open_store(store_url)
    assert again.get("a/one", MANY) == b"other", "another process sees it"
    again.close()
    store.delete("a/one")
    store.delete("a/one")
    assert store.get("a/one", MANY) is None
    assert store.has([]) == []


def test_more_than_wanted_is_refused_unread(store):
    store.put("a/one", bytes(1000))
    assert store.get("a/one", 1000) == bytes(1000)
    with pytest.raises(StoreError) as error:
        store.get("a/one", 999)
    assert error.value.reason == Reason.TOO_LARGE


@pytest.mark.parametrize("key", ["one", "a/../b", "a/b/c", "/b", "a/", "A/b", "a/b\n", "a/b*"])
def test_a_key_cannot_leave_its_namespace(tmp_path, key):
    for store in (LocalStore(tmp_path), RedisStore("127.0.0.1", 9), ObjectStore("memory:///")):
        for use in (store.get, store.put, lambda key, _, has=store.has: has([key])):
            with pytest.raises(ValueError, match="namespace/name"):
                use(key, 1)


def test_what_outlives_its_ttl_is_gone(store_url):
    with closing(open_store(store_url + "?ttl_s=3600")) as store:
        store.put("a/one", b"x")
        assert store.get("a/one", MANY) == b"x"
    with closing(open_store(store_url + "?ttl_s=1.2")) as store:
        store.put("a/one", b"x")
        while store.get("a/one", MANY) is not None:
            time.sleep(0.1)
        assert store.has(["a/one"]) == [False]


def test_readers_never_see_a_part(store):
    """One writer replaces a chunk again and again; every read is whole."""
    versions = [bytes([i]) * 200_000 for i in range(4)]
    store.put("a/one", versions[0])
    # Moto, as S3, now and then answers 500 for what is just being replaced.
    broken = StoreError if isinstance(store, ObjectStore) else ()

    def write():
        for i in range(40):
            store.put("a/one", versions[i % 4])

    with ThreadPoolExecutor(1) as writer:
        writing = writer.submit(write)
        while not writing.done():
            with suppress(broken):
                assert store.get("a/one", MANY) in versions
        writing.result()
    assert store.get("a/one", MANY) == versions[39 % 4]


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("ftp://x/y", "unknown kind"),
        ("nothing", "unknown kind"),
        ("file://relative/path", "absolute"),
        ("redis://", "redis://host:port/db"),
        ("redis://host:port", "store: Port could not be cast"),
        ("redis://[::1", "store: Invalid IPv6 URL; known are file:"),
        ("s3://", "s3://bucket/prefix"),
        ("redis://user:secret@host/0", "REDIS_PASSWORD"),
        ("file:///tmp/x?max_gb=-1", "max_gb"),
        ("file:///tmp/x?colour=red", "colour"),
        ("redis://host/0?max_gb=1", "file:// only"),
        ("redis://host/0?ttl_s=nan", "ttl_s"),
        ("redis://host/0?gbps=fast", "gbps"),
        ("redis://host/0?gbps=1,0", "gbps"),
    ],
)
def test_a_bad_url_is_answered_in_one_line(url, says):
    with pytest.raises(ValueError, match=says) as error:
        open_store(url)
    assert "\n" not in str(error.value) and "secret" not in str(error.value)


def test_a_full_directory_drops_the_least_recently_used(tmp_path):
    store = LocalStore(tmp_path, max_bytes=10_000)
    for i in range(10):
        store.put(f"a/chunk{i}", bytes(1000))
        os.utime(store._path(f"a/chunk{i}"), (1000 + i, time.time()))
    assert store.get("a/chunk0", MANY) is not None, "reading makes it recent"
    store.put("a/new", bytes(1000))
    there = store.has([f"a/chunk{i}" for i in range(10)])
    assert there == [True, False, False] + [True] * 7
    assert store.has(["a/new"]) == [True]
    assert sum(p.stat().st_size for p in tmp_path.rglob("*.kvc")) <= 10_000
    with pytest.raises(StoreError) as error:
        store.put("a/huge", bytes(20_000))
    assert error.value.reason == Reason.FULL


def test_a_writer_that_died_leaves_nothing_visible(tmp_path):
    store = LocalStore(tmp_path)
    store.put("a/one", b"x")
    orphan = store._path("a/one").parent / "dead.part"
    orphan.write_bytes(bytes(50))
    assert LocalStore(tmp_path, max_bytes=60).has(["a/dead"]) == [False]
    os.utime(orphan, (0, 0))
    LocalStore(tmp_path)
    assert not orphan.exists(), "it is swept once it is old"


def test_a_directory_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file"):
        open_store(f"file://{tmp_path}/file/below")


@needs_redis
def test_redis_down_slow_and_full_are_told_apart(tmp_path: Path):
    with redis_server(tmp_path, "--maxmemory", "3mb") as (url, process):
        store = open_store(url)
        store.put("a/one", b"x")
        with pytest.raises(StoreError) as full:
            for i in range(8):
                store.put(f"a/chunk{i}", bytes(MANY))
        assert full.value.reason == Reason.FULL
        assert store.get("a/one", MANY) == b"x"
        os.kill(process.pid, signal.SIGSTOP)
        with pytest.raises(StoreError) as slow:
            open_store(url + "?timeout_s=0.5").get("a/one", MANY)
        assert slow.value.reason == Reason.SLOW
        os.kill(process.pid, signal.SIGCONT)
        process.kill()
        process.wait()
        for use in (lambda: store.get("a/one", 9), lambda: store.has(["a/one"])):
            with pytest.raises(StoreError) as down:
                use()
            assert down.value.reason == Reason.DOWN


def test_an_object_store_that_is_down_says_so(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    store = open_store("s3://kv/cache?timeout_s=1")
    with pytest.raises(StoreError) as error:
        store.get("a/one", MANY)
    assert error.value.reason in (Reason.DOWN, Reason.SLOW)


@needs_redis
def test_redis_credentials_come_from_the_environment(tmp_path, monkeypatch):
    with redis_server(tmp_path, "--requirepass", "hidden") as (url, _):
        with pytest.raises(StoreError) as error:
            open_store(url).get("a/one", 1)
        assert error.value.reason == Reason.DENIED
        monkeypatch.setenv("REDIS_PASSWORD", "hidden")
        assert open_store(url).get("a/one", 1) is None


def test_a_throttled_store_lets_bytes_through_at_its_rate(tmp_path):
    slept = []
    store = ThrottledStore(LocalStore(tmp_path), lambda moved: 8e6 if moved < 1000 else 4e6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "sleep", slept.append)
        store.put("a/one", bytes(1000))
        store.get("a/one", MANY)
    assert slept == [0.001, 0.002]


def test_a_throttled_store_is_named_by_its_url_and_begins_anew_after_a_rest(tmp_path):
    store = open_store(f"{tmp_path}?gbps=2,0.2,1&step_mb=0.001")
    slept, now = [], iter([0.0, 0.0, 0.5, 0.5, 0.9, 0.9, 1.0, 1.0, 5.0, 5.0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "sleep", slept.append)
        patch.setattr(time, "monotonic", lambda: next(now))
        store._moved_at = 0.0
        for _ in range(5):
            store.put("a/one", bytes(1000))
    assert slept == pytest.approx([4e-6, 4e-5, 8e-6, 8e-6, 4e-6])
