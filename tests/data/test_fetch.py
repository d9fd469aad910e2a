"""Downloads are whole and checked; archives stay inside their folder."""

import io
import socket
import tarfile
import urllib.request
import zipfile

import pytest

from genossm.data.examples import Example, Target
from genossm.data.fetch import checksum, download, hub_rows, load_table, save_table, unpack
from genossm.dna.interval import Interval


def zipped(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return path


def test_download_is_checked_and_remembered(tmp_path):
    source = tmp_path / "source.bin"
    source.write_bytes(b"DNA" * 1000)
    got = download(source.as_uri(), tmp_path / "got.bin", checksum(source))
    assert got.read_bytes() == source.read_bytes()
    with pytest.raises(ValueError, match="has the SHA-256"):
        download(source.as_uri(), tmp_path / "other.bin", "0" * 64)
    assert not (tmp_path / "other.bin").exists()
    got.write_bytes(b"changed")
    with pytest.raises(ValueError, match="damaged or another version"):
        download(source.as_uri(), got)


def test_no_network_says_what_can_be_done(tmp_path):
    with pytest.raises(ConnectionError, match=r"could not be fetched .* put it at"):
        download((tmp_path / "nothing").as_uri(), tmp_path / "a.zip")
    with pytest.raises(ValueError, match="needs https"):
        download("http://example.org/a.zip", tmp_path / "a.zip")
    assert not list(tmp_path.iterdir())


def test_archive_is_unpacked_whole(tmp_path):
    folder = unpack(zipped(tmp_path / "a.zip", {"x/y.txt": "one", "z.txt": "two"}), tmp_path / "out")
    assert (folder / "x" / "y.txt").read_text() == "one"
    packed = tmp_path / "a.tar.gz"
    with tarfile.open(packed, "w:gz") as archive:
        info = tarfile.TarInfo("x/w.txt")
        info.size = 5
        archive.addfile(info, io.BytesIO(b"three"))
    assert (unpack(packed, tmp_path / "out") / "x" / "w.txt").read_text() == "three"
    assert not (tmp_path / "out" / "z.txt").exists()


@pytest.mark.parametrize("name", ["../evil.txt", "/evil.txt", "a/../../evil.txt", "..\\evil.txt", "C:/evil.txt"])
def test_no_member_leaves_the_folder(name, tmp_path):
    (tmp_path / "in").mkdir()
    archive = zipped(tmp_path / "in" / "a.zip", {name: "x"})
    with pytest.raises(ValueError, match="would leave its folder"):
        unpack(archive, tmp_path / "in" / "out")
    assert [p.name for p in tmp_path.rglob("*")] == ["in", "a.zip"]


def test_links_bombs_and_damage_are_refused(tmp_path):
    linked = tmp_path / "a.tar"
    with tarfile.open(linked, "w") as archive:
        info = tarfile.TarInfo("link")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(info)
    with pytest.raises(ValueError, match="neither file nor folder"):
        unpack(linked, tmp_path / "out")
    with pytest.raises(ValueError, match="would unpack to 100 bytes"):
        unpack(zipped(tmp_path / "b.zip", {"x": "0" * 100}), tmp_path / "out", limit=99)
    (tmp_path / "c.zip").write_bytes(b"PK no archive")
    with pytest.raises(ValueError, match="no readable archive"):
        unpack(tmp_path / "c.zip", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_kept_table_is_what_was_kept(tmp_path):
    target = Target(kind="binary", names=("n", "p"))
    splits = {"train": [Example("ACG", 1, Interval("1", 5, 8, "-"), "a"), Example("TT", 0)], "val": [], "test": []}
    save_table(tmp_path / "t.parquet", splits, target, ["one", "two"])
    assert load_table(tmp_path / "t.parquet") == (splits, target, ["one", "two"])
    (tmp_path / "t.parquet").write_bytes(b"no")
    with pytest.raises(ValueError, match="damaged"):
        load_table(tmp_path / "t.parquet")


def test_a_hub_out_of_reach_is_asked_once(monkeypatch):
    constants = pytest.importorskip("huggingface_hub").constants
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    asked = []
    original = urllib.request.urlopen
    monkeypatch.setattr(urllib.request, "urlopen", lambda *a, **k: (asked.append(a), original(*a, **k))[1])
    with pytest.raises(ConnectionError, match=f"{endpoint} can't be reached .*refused"):
        hub_rows("someone/dna", "train")
    assert len(asked) == 1
