"""INPUT arguments -> images and ids."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

import vitrt.sources.folder as walk_module
from vitrt.sources.folder import walk
from vitrt.sources.inputs import InputError, Inputs
from vitrt.sources.options import SourceOptions
from vitrt.sources.record import Record


def ids(*arguments: str | Path) -> list[str]:
    return [source.id for source in Inputs([str(argument) for argument in arguments])]


def problems(*arguments: str | Path) -> dict[str, str]:
    sources = Inputs([str(argument) for argument in arguments])
    return {source.id: source.problem for source in sources if source.problem is not None}


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return path


def test_folder(tmp_path: Path) -> None:
    for name in (
        "b.jpg",
        "a.PNG",
        "z/c.WebP",
        "z/y/d.tiff",
        "notes.txt",
        "noextension",
        "x.jpg.md",
    ):
        touch(tmp_path / name)
    for name in (".hidden.jpg", "._b.jpg", ".git/e.jpg"):
        touch(tmp_path / name)
    assert ids(tmp_path) == ["a.PNG", "b.jpg", "z/c.WebP", "z/y/d.tiff"]
    assert ids(f"{tmp_path}/") == ids(tmp_path)
    source = next(iter(Inputs([str(tmp_path / "z")])))
    status = (tmp_path / "z/c.WebP").stat()
    assert source == Record("c.WebP", str(tmp_path / "z/c.WebP"), status.st_size, status.st_mtime)


def test_what_is_left_out_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(5):
        touch(tmp_path / f"IMG_{number}")
        touch(tmp_path / f"sub/{number}.PSD")
    with pytest.raises(InputError, match=r"no image: 10 files left out by their suffix .*5 \.psd"):
        Inputs([tmp_path]).check_any()
    touch(tmp_path / "a.png")
    inputs = Inputs([tmp_path])
    inputs.check_any()
    caplog.set_level("INFO")
    for _ in range(2):  # counted anew each time
        assert [record.id for record in inputs.until(lambda: False)] == ["a.png"]
        assert inputs.file_filter.left_out == {"": 5, ".psd": 5}
        expected = "10 files left out by their suffix (5 with none, 5 .psd; --all-files tries them)"
        assert expected in caplog.text
        caplog.clear()
    everything = Inputs([tmp_path], SourceOptions(all_files=True))
    assert len(list(everything.until(lambda: False))) == 11
    assert not everything.file_filter.left_out and caplog.text == ""


def test_two_folders_with_one_name_that_is_no_image(tmp_path: Path) -> None:
    touch(tmp_path / "one/IMG_1")
    touch(tmp_path / "two/IMG_1")
    both = [tmp_path / "one", tmp_path / "two"]
    assert list(Inputs(both)) == []
    with pytest.raises(InputError, match="would both get the id 'IMG_1'"):
        Inputs(both, SourceOptions(all_files=True))
    with pytest.raises(InputError, match="share files"):
        Inputs([tmp_path / "one", tmp_path / "one/IMG_1"], SourceOptions(all_files=True))


def test_single_file_is_always_tried(tmp_path: Path) -> None:
    assert ids(touch(tmp_path / "deep/a.jpg")) == ["a.jpg"]
    assert ids(touch(tmp_path / "strange.dat"), touch(tmp_path / ".hidden")) == [
        "strange.dat",
        ".hidden",
    ]


def test_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, other = touch(tmp_path / "lists/in/a.jpg"), touch(tmp_path / "other/b.jpg")
    names = ["in/a.jpg", "", "./in/../in/c.jpg", str(inside), str(other), "../other/b.jpg", "in"]
    (tmp_path / "lists/list.txt").write_text("\r\n".join(names))
    monkeypatch.chdir(tmp_path)
    outside = str(other).lstrip("/")
    assert ids("@lists/list.txt") == ["in/a.jpg", "in/c.jpg", outside, "in"]
    found = problems("@lists/list.txt")
    assert set(found) == {"in/c.jpg", "in"}
    assert "No such file" in found["in/c.jpg"] and "folder" in found["in"]


def test_two_files_of_a_list_with_one_id_are_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outside = touch(tmp_path / "a.jpg")
    inside = touch(tmp_path / "lists" / str(outside).lstrip("/"))
    names = tmp_path / "lists/list.txt"
    for one, two in ((outside, inside), (inside, outside)):
        names.write_text(f"{one}\n{one}\n{two}\n")
        with pytest.raises(InputError, match=f"{one} and {two} would both get the id"):
            Inputs([f"@{names}"])
    names.write_text(f"{outside}\n{outside}\n")
    assert len(ids(f"@{names}")) == 1
    assert caplog.text.count("more than once") == 1


def test_text_of_a_list(tmp_path: Path) -> None:
    touch(tmp_path / "\u00e9.jpg")
    names = tmp_path / "list.txt"
    for text in ("\u00e9.jpg\nb.jpg\n", "\r\n \t\r\n\u00e9.jpg\n  \nb.jpg"):
        for encoding in ("utf-8", "utf-8-sig"):
            names.write_bytes(text.encode(encoding))
            assert ids(f"@{names}") == ["\u00e9.jpg", "b.jpg"]
            assert set(problems(f"@{names}")) == {"b.jpg"}
    for encoding in ("utf-16", "utf-16-be"):
        names.write_bytes(b"\xfe\xff" * (encoding == "utf-16-be") + "a.jpg\n".encode(encoding))
        with pytest.raises(InputError, match=r"list\.txt is UTF-16; save it as UTF-8"):
            Inputs([f"@{names}"])
    names.write_bytes(b"a.jpg\nb.jpg\0c.jpg\0")  # as of find -print0
    with pytest.raises(InputError, match=r"list\.txt holds a NUL byte in line 2"):
        Inputs([f"@{names}"])


def test_a_list_that_can_be_read_only_once_is_an_error() -> None:
    read, write = os.pipe()
    os.write(write, b"a.jpg\n")
    os.close(write)
    with pytest.raises(InputError, match="not a regular file.*write it to a file first"):
        Inputs([f"@/dev/fd/{read}"])  # as of @<(find ...)
    os.close(read)


def test_dots_after_a_link_mean_what_they_mean_to_the_system(tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    touch(tmp_path / "lists/y.png").write_bytes(b"another one")
    real = touch(tmp_path / "far/away/x.png").parent.parent / "y.png"
    real.write_bytes(b"the one")
    (tmp_path / "lists/link").symlink_to(tmp_path / "far/away")
    names = tmp_path / "lists/list.txt"
    lines = ["link/../y.png", "y.png", "link/x.png", "link/./../away/../y.png", "gone/../y.png"]
    names.write_text("\n".join(lines))
    wanted = {str(real).lstrip("/"): b"the one", "y.png": b"another one", "link/x.png": b"x"}
    for path in (names, tmp_path / "lists/link/../../lists/list.txt"):
        found = {source.id: Path(source.path).read_bytes() for source in Inputs([f"@{path}"])}
        assert found == wanted
    names.write_text("gone/../y.png")
    assert "No such file" in problems(f"@{names}")["y.png"]
    touch(tmp_path / "far/list.txt").write_text("y.png")
    (source,) = Inputs([f"@{tmp_path}/lists/link/../list.txt"])  # beside its list
    assert source.id == "y.png" and Path(source.path).read_bytes() == b"the one"


def test_listing_ends_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there is no image to look up from."""
    for folder in range(20):
        for name in range(20):
            touch(tmp_path / f"{folder:02}/{name:02}.txt")
    opened: list[str] = []
    scandir = os.scandir

    def counted(path: str) -> Iterator[os.DirEntry[str]]:
        opened.append(path)
        return scandir(path)

    inputs = Inputs([str(tmp_path)])
    monkeypatch.setattr(walk_module.os, "scandir", counted)
    looks = count()
    assert list(inputs.until(lambda: next(looks) > 100)) == []
    assert 1 < len(opened) < 10
    looks = count()
    (tmp_path / "list.txt").write_text("".join(f"{n}.jpg\n" for n in range(100)))
    assert len(list(Inputs([f"@{tmp_path}/list.txt"]).until(lambda: next(looks) >= 7))) == 7


def test_what_is_not_there(tmp_path: Path) -> None:
    for argument in ("missing", "@missing.txt"):
        with pytest.raises(InputError, match="missing"):
            Inputs([str(tmp_path / argument) if argument[0] != "@" else argument])
    with pytest.raises(InputError, match="no INPUT"):
        Inputs([])


def test_what_is_content_and_no_path_is_not_echoed(tmp_path: Path) -> None:
    url = "data:image/png;base64," + "A" * 3_000_000
    with pytest.raises(InputError, match="a data: URL is an image in Python") as raised:
        Inputs([url])
    assert len(str(raised.value)) < 500
    with pytest.raises(InputError, match="cannot be opened") as raised:
        Inputs(["nosuch://" + "A" * 3_000_000])
    assert len(str(raised.value)) < 500


def test_equal_ids_are_an_error(tmp_path: Path) -> None:
    for name in ("one/a.jpg", "one/b.jpg", "two/b.jpg", "two/c.jpg"):
        touch(tmp_path / name)
    (tmp_path / "list.txt").write_text("b.jpg\n")
    touch(tmp_path / "b.jpg")
    both = (tmp_path / "one", tmp_path / "two")
    for arguments in (
        both,
        (tmp_path / "one", tmp_path / "two/b.jpg"),
        (tmp_path / "two/b.jpg", tmp_path / "one"),
        (tmp_path / "one/b.jpg", tmp_path / "two/b.jpg"),
        (f"@{tmp_path}/list.txt", tmp_path / "one"),
        (tmp_path / "one", f"@{tmp_path}/list.txt"),
    ):
        with pytest.raises(InputError, match=r"b\.jpg.*would both get the id 'b\.jpg'"):
            ids(*arguments)
    assert ids(tmp_path / "one", tmp_path / "two/c.jpg") == ["a.jpg", "b.jpg", "c.jpg"]


def test_one_folder_inside_another_is_an_error(tmp_path: Path) -> None:
    touch(tmp_path / "one/two/a.jpg")
    for arguments in ((tmp_path, tmp_path / "one"), (tmp_path / "one", tmp_path / "one")):
        with pytest.raises(InputError, match="share files"):
            Inputs([str(argument) for argument in arguments])


def test_a_file_inside_a_folder_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = tmp_path / "photos"
    for name in ("a.jpg", "sub/b.jpg", "sub/c.dat", ".hidden/d.jpg"):
        touch(photos / name)
    (tmp_path / "link").symlink_to(photos / "sub")
    monkeypatch.chdir(photos / "sub")
    for inner in (photos / "sub/b.jpg", tmp_path / "link/b.jpg", "b.jpg", "../a.jpg"):
        for arguments in ((photos, inner), (inner, photos)):
            with pytest.raises(InputError, match=f"{inner} and INPUT {photos} share files"):
                Inputs([str(argument) for argument in arguments])
    # What a walk leaves out is encoded once.
    assert set(ids(photos, "c.dat", "../.hidden/d.jpg")) == {"a.jpg", "sub/b.jpg", "c.dat", "d.jpg"}


def test_many_files_are_listed_in_linear_time(tmp_path: Path) -> None:
    """Each was once looked up in all before. Calls count, which no busy machine changes."""
    first = touch(tmp_path / "0.jpg")
    for index in range(1, 2000):
        os.link(first, tmp_path / f"{index}.jpg")
    names = [str(tmp_path / f"{index}.jpg") for index in range(2000)]

    def calls(count: int) -> int:
        made = 0

        def profile(frame: object, event: str, argument: object) -> None:
            nonlocal made
            made += event in ("call", "c_call")

        sys.setprofile(profile)
        try:
            assert sum(1 for _ in Inputs(names[:count])) == count
        finally:
            sys.setprofile(None)
        return made

    calls(10)  # imports and caches
    assert calls(2000) < 4 * 1.2 * calls(500)
    touch(tmp_path / "other/1999.jpg")
    with pytest.raises(InputError, match="would both get the id '1999.jpg'"):
        Inputs([*names, str(tmp_path / "other/1999.jpg")])


def test_links(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    touch(folder / "a.jpg")
    touch(tmp_path / "elsewhere/b.jpg")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "loop").symlink_to(folder)
    (tmp_path / "elsewhere/back").symlink_to(folder)
    (folder / "file.jpg").symlink_to(folder / "a.jpg")
    (folder / "broken.jpg").symlink_to(folder / "gone.jpg")
    (folder / "round.jpg").symlink_to(folder / "round.jpg")
    (folder / "round").symlink_to(folder / "round")
    assert ids(folder) == ["a.jpg", "broken.jpg", "file.jpg", "round.jpg", "linked/b.jpg"]
    assert set(problems(folder)) == {"broken.jpg", "round.jpg"}


def test_what_only_looks_like_an_image(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").mkdir()
    touch(tmp_path / "album.jpg/a.jpg")
    os.mkfifo(tmp_path / "pipe.png")
    assert ids(tmp_path) == ["pipe.png", "album.jpg/a.jpg", "empty.jpg"]
    found = problems(tmp_path)
    assert "not a regular file" in found["pipe.png"] and "folder" in found["empty.jpg"]


def test_unreadable_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path / "a.jpg")
    touch(tmp_path / "locked/b.jpg")
    scandir = os.scandir

    def refuse(path: str) -> Iterator[os.DirEntry[str]]:
        if path.endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(walk_module.os, "scandir", refuse)
    assert ids(tmp_path) == ["a.jpg", "locked"]
    assert "Permission denied" in problems(tmp_path)["locked"]


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    root = os.fsencode(tmp_path)
    for name in (b"caf\xe9.png", b"d\xff/e.png"):
        path = os.path.join(root, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(b"x")
    found = {source.id: source for source in Inputs([str(tmp_path)])}
    assert list(found) == ["caf\\xe9.png", "d\\xff/e.png"]
    assert all(source.problem is None and source.size == 1 for source in found.values())
    for source in found.values():
        source.id.encode()
        assert os.path.exists(source.path)
    touch(tmp_path / "caf\\xe9.png")  # the same text, as the true name of another file
    found = {source.id: source for source in Inputs([str(tmp_path)])}
    assert found["caf\\xe9.png"].problem is None
    assert "name of another file" in str(found["caf\\xe9.png (not UTF-8)"].problem)


def test_equal_ids_of_names_that_are_not_utf8_are_an_error(tmp_path: Path) -> None:
    root = os.fsencode(tmp_path)

    def made(name: bytes) -> None:
        path = os.path.join(root, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(b"x")

    for name in (b"one/caf\xe9.png", b"two/caf\xe9.png", rb"three/caf\xe9.png"):
        made(name)
    one, two, three = tmp_path / "one", tmp_path / "two", tmp_path / "three"
    for both in ((one, two), (one, three), (three, one)):
        with pytest.raises(InputError, match="would both get the id"):
            Inputs([str(folder) for folder in both])
    # In one folder: escapes cannot be taken for what a name spells out.
    mixed = tmp_path / "mixed"
    for name in (b"mixed/\xff/\\xff.png", b"mixed/\\xff/\xff.png", b"mixed/a\\b.png"):
        made(name)
    assert sorted(ids(mixed)) == ["\\\\xff/\\xff.png", "\\xff/\\\\xff.png", "a\\b.png"]
    assert problems(mixed) == {}
    with pytest.raises(InputError, match="would both get the id"):
        made(b"mixed2/\\xff/\xff.png")
        Inputs([str(mixed), str(tmp_path / "mixed2")])


def test_deep_trees_and_large_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk_module, "_SORTED_NAMES", 7)
    for index in range(40):
        touch(tmp_path / f"{index:03}.jpg")
    deep = tmp_path
    for level in range(200):
        deep = deep / f"{level:03}"
    touch(deep / "bottom.jpg")
    found = ids(tmp_path)
    assert len(found) == len(set(found)) == 41
    assert any(name.endswith("/bottom.jpg") for name in found)


def test_listing_is_lazy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk_module, "_SORTED_NAMES", 10)
    for index in range(500):
        touch(tmp_path / f"{index:03}.jpg")
    looked = 0
    stat = os.stat

    def counted(*args: object, **kwargs: object) -> os.stat_result:
        nonlocal looked
        looked += 1
        return stat(*args, **kwargs)

    monkeypatch.setattr(walk_module.os, "stat", counted)
    sources = walk(str(tmp_path))
    next(sources)
    assert looked < 20
