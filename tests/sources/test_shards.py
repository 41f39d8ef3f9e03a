"""Tars, Parquet files, datasets on disk and URLs: the same images, and what is wrong with some."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.folders import FakeEncoder, assert_holds, encode, expected, photo, photos
from tests.support.shards import table_of, write_dataset, write_parquet, write_remote, write_tar
from vitrt import FeatureStore
from vitrt.sources import location, row_reader, tar
from vitrt.sources.inputs import InputError, Inputs
from vitrt.sources.options import SourceOptions
from vitrt.sources.record import Record
from vitrt.store.check import check_folder

COUNT = 9


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return photos(tmp_path / "in", COUNT)


@pytest.fixture(autouse=True)
def no_remote_files() -> Iterator[None]:
    yield
    fsspec.filesystem("memory").store.clear()


def contents(inputs: Inputs) -> dict[str, bytes]:
    found = {}
    for record in inputs:
        assert record.problem is None, record
        data = record.load()
        found[record.id] = data if isinstance(data, bytes) else Path(data).read_bytes()
    return found


def problems(inputs: Inputs) -> dict[str, str]:
    return {record.id: record.problem for record in inputs if record.problem is not None}


def files(folder: Path) -> dict[str, bytes]:
    """Path below the folder -> content, in the order of a listing."""
    return {record.id: Path(record.path).read_bytes() for record in Inputs([folder])}


Maker = Callable[[dict[str, bytes], Path], str]
MAKERS: dict[str, Maker] = {
    "tar": lambda images, folder: str(write_tar(images, folder / "a.tar")),
    "parquet": lambda images, folder: str(write_parquet(images, folder / "a.parquet")),
    "structs": lambda images, folder: str(
        write_parquet(images, folder / "a.parquet", structs=True, rows=4)
    ),
    "dataset": lambda images, folder: str(write_dataset(images, folder / "dataset")),
    "memory folder": lambda images, folder: write_remote(images, "memory://bucket/in"),
    "memory tar": lambda images, folder: write_remote(
        {"a.tar": write_tar(images, folder / "a.tar").read_bytes()}, "memory://bucket/t", "a.tar"
    ),
    "memory parquet": lambda images, folder: write_remote(
        {"a.parquet": write_parquet(images, folder / "a.parquet").read_bytes()},
        "memory://bucket/p",
        "a.parquet",
    ),
}


def ids_of(kind: str, names: Sequence[str]) -> list[str]:
    """What a source of a kind calls images of these names."""
    if kind == "memory folder":
        return list(names)
    if "tar" in kind:
        return [f"a.tar/{name.rpartition('.')[0]}" for name in names]
    shard = "data-00000-of-00001.arrow" if kind == "dataset" else "a.parquet"
    return [f"{shard}/{row}" for row in range(len(names))]


@pytest.mark.parametrize("kind", MAKERS)
def test_every_source_gives_the_same_features(kind: str, folder: Path, tmp_path: Path) -> None:
    wanted, images = expected(folder), files(folder)
    source = MAKERS[kind](images, tmp_path)
    inputs = Inputs([source])
    assert list(contents(inputs).items()) == list(
        zip(ids_of(kind, list(images)), images.values(), strict=True)
    )
    output = tmp_path / "out"
    encode(folder, output, records=inputs)
    named = dict(zip(ids_of(kind, list(images)), wanted.values(), strict=True))
    assert_holds(output, named)
    encoder = FakeEncoder()
    encode(folder, output, records=Inputs([source]), encoder=encoder)
    assert encoder.batches == []  # all was there
    (output / "manifest-00000.jsonl").write_bytes(b"")
    encode(folder, output, records=Inputs([source]))
    assert_holds(output, named)


@pytest.mark.parametrize("kind", MAKERS)
def test_records_are_loaded_by_other_processes(
    kind: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = Inputs([MAKERS[kind](files(folder), tmp_path)])
    wanted = contents(inputs)
    sent = [Record(**fields) for fields in json.loads(json.dumps([asdict(r) for r in inputs]))]
    monkeypatch.setattr(location, "AHEAD", location.ReadAhead())  # as another process's
    row_reader._runs.clear()
    for record in reversed(sent):  # in any order
        assert record.load() == wanted[record.id]


@pytest.mark.parametrize("kind", MAKERS)
def test_what_changed_is_encoded_again(kind: str, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    encode(folder, output, records=Inputs([MAKERS[kind](files(folder), tmp_path)]))
    photo(folder / "000.png", 99, 35, 45)
    source = MAKERS[kind](files(folder), tmp_path)
    encode(folder, output, records=Inputs([source]))
    wanted = expected(folder)
    assert_holds(output, dict(zip(ids_of(kind, list(files(folder))), wanted.values(), strict=True)))


def test_a_sample_with_several_images(tmp_path: Path) -> None:
    names = ["s/1.left.png", "s/1.right.png", "s/2.png", "3.PNG", "./4.v2.png", "5"]
    write_tar(dict.fromkeys(names, b"x"), tmp_path / "a.tar")
    found = [record.id for record in Inputs([tmp_path / "a.tar"])]
    expected = ["s/1.left.png", "s/1.right.png", "s/2", "3", "4"]
    assert found == [f"a.tar/{name}" for name in expected]
    inputs = Inputs([tmp_path / "a.tar"], SourceOptions(all_files=True))
    assert "a.tar/5" in [record.id for record in inputs]


def test_what_a_tar_leaves_out_is_counted(tmp_path: Path) -> None:
    write_tar({"1.png": b"x", "2.json": b"x", "._3.png": b"x"}, tmp_path / "a.tar")
    inputs = Inputs([tmp_path / "a.tar"])
    assert len(list(inputs)) == 1
    assert inputs.file_filter.left_out == {".txt": 1, ".json": 1}  # not the caption of an image


def test_members_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar({"a.png": b"x", "b.png": b"y", "a.jpg": b"z"}, tmp_path / "a.tar")
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "a.png"
        archive.addfile(link)
        large = tarfile.TarInfo("large.png")
        large.size = 4000
        archive.addfile(large, io.BytesIO(bytes(4000)))
    monkeypatch.setattr(tar, "MOST_BYTES", 3000)
    found = problems(Inputs([path]))
    assert "another image of key a" in found["a.tar/a.jpg"]
    assert "not a regular file" in found["a.tar/link"]
    assert "4000 bytes are more than" in found["a.tar/large"]
    assert len(found) == 3 and len(list(Inputs([path]))) == 5


@pytest.mark.parametrize("place", ["header", "content", "behind a member"])
@pytest.mark.parametrize("remote", [False, True])
def test_a_damaged_tar_gives_what_is_before_the_damage(
    tmp_path: Path, place: str, remote: bool, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_tar({f"{number}.png": bytes(2000) for number in range(4)}, tmp_path / "a.tar")
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as archive:
        member = archive.getmembers()[4]  # of the third sample
    if place == "header":
        data[member.offset : member.offset + 512] = b"?" * 512
    elif place == "content":
        del data[member.offset_data + 100 :]
    else:
        del data[member.offset :]
    path.write_bytes(data)
    source = write_remote({"a.tar": bytes(data)}, "memory://b", "a.tar") if remote else path
    inputs = Inputs([source])
    records = list(inputs)
    assert [record.id for record in records[:2]] == ["a.tar/0", "a.tar/1"]
    assert all(record.problem is None for record in records[:2])
    if place == "behind a member":  # which is where an archive may end without its last blocks
        assert len(records) == 2 and "was it cut short?" in caplog.text
    else:
        assert [record.id for record in records[2:]][-1] == "a.tar"
        assert "cannot be read on" in str(records[-1].problem)
        if place == "content":
            with pytest.raises(OSError, match="ends 1900 bytes too early"):
                records[2].load()
    for record in records[:2]:
        assert record.load() == bytes(2000)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_images_are_skipped_and_named_in_every_source(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images: dict[str, bytes | None] = dict(files(folder))
    images["broken.png"] = b"no image"
    good = len(images) - 1
    for kind in MAKERS:
        output = tmp_path / f"out {kind}"
        encode(folder, output, records=Inputs([MAKERS[kind](images, tmp_path)]))  # type: ignore[arg-type]
        assert check_folder(output).problems == [] and len(FeatureStore(output)) == good
        (error,) = map(json.loads, (output / "errors-00000.jsonl").read_text().splitlines())
        assert error["id"] == ids_of(kind, list(images))[-1]
        assert "not an image" in error["message"]
        shutil.rmtree(output)
        with monkeypatch.context() as patch:
            patch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 600)  # of a bomb twice as many
            encode(folder, output, records=Inputs([MAKERS[kind](images, tmp_path)]))  # type: ignore[arg-type]
        lines = (output / "errors-00000.jsonl").read_text().splitlines()
        assert any("--max-image-pixels" in line for line in lines)
        assert len(lines) + len(FeatureStore(output)) == len(images)
    write_parquet({**images, "null.png": None}, tmp_path / "null.parquet")
    output = tmp_path / "out null"
    encode(folder, output, records=Inputs([tmp_path / "null.parquet"]))
    assert len(FeatureStore(output)) == good
    assert "column image is null" in (output / "errors-00000.jsonl").read_text()


def test_ids_from_a_column(folder: Path, tmp_path: Path) -> None:
    images = files(folder)
    path = write_parquet(images, tmp_path / "a.parquet", rows=4)
    assert list(contents(Inputs([path], SourceOptions(id_column="name")))) == list(images)
    table = table_of({str(number): b"x" for number in range(5)})
    names = pa.array(["a", "b", None, "a", ""])
    pq.write_table(table.set_column(1, "name", names), tmp_path / "b.parquet")
    inputs = Inputs([tmp_path / "b.parquet"], SourceOptions(id_column="name"))
    for _ in range(2):
        found = problems(inputs)
        assert len(found) == 3 and len(list(inputs)) == 5
        assert "is None, which is no id" in found["b.parquet/2"]
        assert "is '', which is no id" in found["b.parquet/4"]
        (again,) = (name for name in found if name.startswith("a ("))
        assert "row 3" in again and "same id" in found[again]


def test_columns_are_found_or_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"left": [b"l"], "right": [b"r"], "text": ["t"]}), path)
    with pytest.raises(InputError, match=r"a\.parquet.*--image-column must say .* left, right"):
        Inputs([path])
    (record,) = Inputs([path], SourceOptions(image_column="right"))
    assert record.load() == b"r"
    for column in ("text", "none"):
        with pytest.raises(InputError, match=f"{column}.*such are: left, right"):
            Inputs([path], SourceOptions(image_column=column))
    with pytest.raises(InputError, match="no column 'none', but left, right, text"):
        Inputs([path], SourceOptions(image_column="left", id_column="none"))
    pq.write_table(pa.table({"text": ["t"]}), path)
    with pytest.raises(InputError, match=r"no column holds bytes.*text \(string\)"):
        Inputs([path])
    with pytest.raises(InputError, match="of tables, and no INPUT is one"):
        Inputs([photos(tmp_path / "in", 1)], SourceOptions(id_column="name"))


def test_a_struct_may_hold_a_path_alone(folder: Path, tmp_path: Path) -> None:
    values = [{"bytes": None, "path": "in/000.png"}, {"bytes": None, "path": None}]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    pq.write_table(pa.table({"image": pa.array(values, kind)}), tmp_path / "a.parquet")
    first, second = Inputs([tmp_path / "a.parquet"])
    assert first.load() == str(folder / "000.png")
    with pytest.raises(ValueError, match="is null"):
        second.load()


@pytest.mark.parametrize("remote", [False, True])
def test_a_folder_of_shards(tmp_path: Path, remote: bool) -> None:
    shards = tmp_path / "shards"
    (shards / "more").mkdir(parents=True)
    write_tar({"1.png": b"1"}, shards / "b.tar")
    write_parquet({"2.png": b"2"}, shards / "more/c.parquet")
    (shards / "README.md").write_text("text")
    source = str(shards)
    if remote:
        data = {str(p.relative_to(shards)): p.read_bytes() for p in shards.rglob("*.*")}
        source = write_remote(data, "memory://shards")
    wanted = {"b.tar/1": b"1", "more/c.parquet/0": b"2"}
    assert contents(Inputs([source])) == wanted
    if remote:
        assert contents(Inputs(["memory://shards/*.tar"])) == {"b.tar/1": b"1"}
        with pytest.raises(InputError, match=r"matches no \.tar"):
            Inputs(["memory://shards/*.md"])
    else:
        (shards / "more/c.parquet").write_bytes(b"no table")
        found = problems(Inputs([source]))
        assert list(found) == ["more/c.parquet"] and "cannot be read" in found["more/c.parquet"]
        photo(shards / "x.png", 1)  # a folder of images, with an archive beside them
        inputs = Inputs([source])
        assert list(contents(inputs)) == ["x.png"] and inputs.file_filter.left_out[".tar"] == 1


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("other", ["photos/x.png", "more/b.tar.gz"])
def test_a_folder_of_shards_drops_nothing_in_silence(
    tmp_path: Path, other: str, remote: bool
) -> None:
    (tmp_path / "in" / other).parent.mkdir(parents=True)
    (tmp_path / "in" / other).write_bytes(b"x")
    write_tar({"1.png": b"1"}, tmp_path / "in/a.tar")
    source = str(tmp_path / "in")
    if remote:
        data = {other: b"x", "a.tar": (tmp_path / "in/a.tar").read_bytes()}
        source = write_remote(data, f"memory://mixed-{other[0]}")
    with pytest.raises(InputError, match=f"is a folder of shards, and {other} in it is none"):
        Inputs([source])


def test_a_shard_is_known_by_its_suffix_in_either_case(tmp_path: Path) -> None:
    write_tar({"1.png": b"1"}, tmp_path / "A.TAR")
    write_parquet({"2.png": b"2"}, tmp_path / "B.PARQUET")
    write_dataset({"3": b"3"}, tmp_path / "d")
    next((tmp_path / "d").glob("*.arrow")).rename(tmp_path / "C.ARROW")
    shutil.rmtree(tmp_path / "d")
    wanted = {"A.TAR/1": b"1", "B.PARQUET/0": b"2"}
    assert contents(Inputs([tmp_path])) == wanted
    assert contents(Inputs([tmp_path / "C.ARROW"])) == {"C.ARROW/0": b"3"}


def test_a_shard_in_a_list_is_told_so(tmp_path: Path) -> None:
    write_tar({"1.png": b"1"}, tmp_path / "a.tar")
    (tmp_path / "list.txt").write_text("a.tar\n")
    found = problems(Inputs([f"@{tmp_path}/list.txt"]))
    assert "give a shard as an INPUT of its own" in found["a.tar"]


def test_datasets_with_splits(folder: Path, tmp_path: Path) -> None:
    write_dataset({"1": b"1"}, tmp_path / "d/train")
    write_dataset({"2": b"2"}, tmp_path / "d/test")
    (tmp_path / "d/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    name = "data-00000-of-00001.arrow/0"
    wanted = {f"train/{name}": b"1", f"test/{name}": b"2"}
    assert contents(Inputs([tmp_path / "d"])) == wanted
    state = tmp_path / "d/test/state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "_indices_files": ["x"]}))
    with pytest.raises(InputError, match="flatten_indices"):
        Inputs([tmp_path / "d/test"])


def test_shards_that_cannot_be_used(tmp_path: Path) -> None:
    for name, data, message in (
        ("a.tar", b"no archive at all", "a.tar cannot be used"),
        ("b.tar", b"\x1f\x8b compressed", "it is compressed"),
        ("c.tar.gz", b"", "compressed tar: unpack it"),
        ("d.parquet", b"no table", "d.parquet cannot be used"),
        ("e.arrow", b"no stream", "e.arrow cannot be used"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=message):
            Inputs([tmp_path / name])
    for url, message in (
        ("memory://nothing/here", "memory://nothing/here does not exist"),
        ("nosuch://bucket/x", "nosuch://bucket/x cannot be opened: .*nosuch"),
        ("memory://x/*.tar", "matches no"),
    ):
        with pytest.raises(InputError, match=message):
            Inputs([url])


def test_equal_ids_of_several_sources_are_an_error(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_tar({"1.png": b"x"}, tmp_path / name / "a.tar")
        write_remote({"1.png": b"x"}, f"memory://{name}")
    with pytest.raises(InputError, match=r"would both get the id 'a\.tar'"):
        Inputs([tmp_path / "one/a.tar", tmp_path / "two/a.tar"])
    (tmp_path / "in/a.tar").mkdir(parents=True)
    (tmp_path / "in/a.tar/1").write_bytes(b"x")
    with pytest.raises(InputError, match=r"would both get the id 'a\.tar/1'"):
        list(Inputs([tmp_path / "one/a.tar", tmp_path / "in"], SourceOptions(all_files=True)))
    with pytest.raises(InputError, match=r"would both get the id '1\.png'"):
        list(Inputs(["memory://one", "memory://two"]))
    with pytest.raises(InputError, match=r"would both get the id '1\.png'"):
        list(Inputs(["memory://one/1.png", "memory://two"]))


def test_file_urls_are_paths(folder: Path) -> None:
    assert contents(Inputs([folder.as_uri()])) == files(folder)
    (record,) = Inputs([(folder / "000.png").as_uri()])
    assert record.load() == str(folder / "000.png")


def test_a_listing_of_rows_reads_no_image(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_parquet(files(folder), tmp_path / "a.parquet", rows=4)
    read: list[str] = []
    real = pq.ParquetFile.iter_batches

    def counted(self: pq.ParquetFile, *args: object, **kwargs: object) -> object:
        read.extend(kwargs["columns"])  # type: ignore[call-overload]
        return real(self, *args, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    assert len(list(Inputs([path], SourceOptions(id_column="name")))) == COUNT
    assert set(read) == {"name"}
    next(iter(Inputs([path]))).load()
    assert read[-1] == "image"


def test_rows_are_read_forward_in_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row group may be a whole file of gigabytes."""
    monkeypatch.setattr(row_reader, "_BATCH_ROWS", 2)
    images = {str(number): f"{number}".encode() for number in range(100)}
    (*records,) = Inputs([write_parquet(images, tmp_path / "a.parquet")])
    row_reader._runs.clear()
    for number in (0, 5, 3, 60, 59, 35, 99, 0):  # 35 is kept no more, so it is read again
        assert records[number].load() == str(number).encode()
        (run,) = row_reader._runs.values()
        assert sum(map(len, run._kept)) <= 2 * row_reader._KEPT_BATCHES


def test_rows_before_a_damaged_page_are_read_and_those_behind_it_say_so(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"image": [bytes([row]) * 5000 for row in range(200)]})
    pages = {"data_page_size": 1 << 16, "use_dictionary": False, "write_batch_size": 5}
    pq.write_table(table, path, compression="zstd", row_group_size=150, **pages)
    data = bytearray(path.read_bytes())
    starts = [
        found.start() for found in re.finditer(re.escape(b"\x28\xb5\x2f\xfd"), data)
    ]  # zstd's pages
    assert len(starts) > 12
    data[starts[7]] ^= 0xFF  # whose first row is 105
    path.write_bytes(data)
    records = list(Inputs([path]))
    read = 0
    for row, record in enumerate(records):
        try:
            assert record.load() == bytes([row]) * 5000
            read += 1
        except (OSError, ValueError) as error:
            problem = "ZSTD" if row == 105 else "it is damaged before this row: ZSTD"
            assert problem in str(error) and 105 <= row < 150
    assert read == 105 + 50  # the other row group is whole
    assert records[50].load() == bytes([50]) * 5000  # once more, from before


class _AnswerError(Exception):
    """A client's error, which has the status that a server gave."""

    def __init__(self, status: int) -> None:
        super().__init__(f"{status}, message='...'")
        self.status = status


@pytest.mark.parametrize(
    ("cause", "message"),
    [
        (ConnectionRefusedError(111, "Connection refused"), "cannot be opened: Connection refused"),
        (_AnswerError(503), "cannot be opened: 503"),
        (_AnswerError(404), "does not exist"),
        (None, "does not exist"),
    ],
    ids=["no answer", "503", "404", "no cause"],
)
def test_a_server_that_does_not_answer_is_no_missing_file(
    cause: Exception | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fsspec's file system of HTTP raises FileNotFoundError for all of them."""

    def info(self: object, path: str, **named: object) -> None:
        raise FileNotFoundError(path) from cause

    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "info", info)
    with pytest.raises(InputError, match=rf"memory://a/b {message}"):
        Inputs(["memory://a/b"])


def test_tables_of_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path is no URL, and need not be UTF-8."""
    monkeypatch.chdir(tmp_path)
    images = {"a.png": b"one", "b.png": b"two"}
    write_parquet(images, tmp_path / "plain.parquet")
    names = "file:x.parquet", "a:b.parquet", "%41#?.parquet", os.fsdecode(b"t\xff.parquet")
    for name in names:
        os.link("plain.parquet", name)
        assert [record.load() for record in Inputs([name])] == [b"one", b"two"]


@pytest.mark.parametrize(
    "changed",
    [
        1700000001,
        1700000001.5,
        "1700000001",
        "2024-05-01T12:00:01Z",
        "2024-05-01 12:00:01.25",
        "Wed, 01 May 2024 12:00:01 GMT",
        "20240501120001",  # FTP's
        datetime(2024, 5, 1, 12, 0, 1),  # without a zone: the same on every host
        datetime(2024, 5, 1, 12, 0, 1, tzinfo=timezone.utc),
        datetime(2024, 5, 1, 14, 0, 1, tzinfo=timezone(timedelta(hours=2))),
    ],
)
@pytest.mark.parametrize("key", ["mtime", "LastModified", "modify", "Last-Modified"])
def test_the_times_of_file_systems_are_understood(key: str, changed: Any) -> None:
    size, mtime = location.remote_state({"size": 7, key: changed, "ETag": "x"})
    assert size == 7 and mtime > 1e9
    if isinstance(changed, datetime) or (isinstance(changed, str) and "12:00:01" in changed):
        assert int(mtime) == 1714564801
    assert location.remote_state({"size": 7, key: changed, "ETag": "y"}) == (7, mtime)


def test_what_is_no_time_gives_way_to_the_tag() -> None:
    for value in ("yesterday", "", None, float("nan"), True, ["x"]):
        first, same, other = (
            location.remote_state({"size": None, "LastModified": value, "ETag": tag})
            for tag in ("a", "a", "b")
        )
        assert first == same != other and first[0] == 0
    # What was made once and written again since: the tag tells, the time of its making does not.
    made = {"size": 1, "created": "2024-05-01T12:00:01Z"}
    assert location.remote_state({**made, "etag": "a"}) != location.remote_state(
        {**made, "etag": "b"}
    )
    assert location.remote_state(made)[1] == 1714564801
    assert location.remote_state({}) == (0, 0.0)


def test_the_tail_of_a_remote_tar_is_read_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = files(folder)
    source = MAKERS["memory tar"](images, tmp_path)
    parts: list[int] = []
    real = type(fsspec.filesystem("memory")).cat_file

    def counted(self: object, path: str, start: int | None = None, end: int | None = None) -> bytes:
        parts.append(start or 0)
        return real(self, path, start=start, end=end)

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "cat_file", counted)
    assert [record.load() for record in Inputs([source])] == list(images.values())
    assert parts == []  # the listing has passed them
    small = location.ReadAhead(most_bytes=2000)
    for module in (location, tar):
        monkeypatch.setattr(module, "AHEAD", small)
    assert [record.load() for record in list(Inputs([source]))] == list(images.values())
    assert parts and small._bytes <= 2000


def test_a_list_may_name_urls(folder: Path, tmp_path: Path) -> None:
    images = files(folder)
    write_remote(images, "memory://bucket/in")
    lines = [f"memory://bucket/in/{name}" for name in images]
    lines += [(folder / "000.png").as_uri(), "memory://bucket/none.png", "nosuch://x/y.png"]
    (tmp_path / "list.txt").write_text("\n".join([*lines, lines[0]]))
    inputs = Inputs([f"@{tmp_path / 'list.txt'}"])
    found = problems(inputs)
    assert list(found) == ["bucket/none.png", "x/y.png"]
    assert "cannot be read" in found["bucket/none.png"] and "nosuch" in found["x/y.png"]
    good = {record.id: record for record in inputs if record.problem is None}
    assert list(good) == [*(f"bucket/in/{name}" for name in images), "in/000.png"]
    assert [good[f"bucket/in/{name}"].load() for name in images] == list(images.values())
    assert all(record.size > 0 and record.mtime > 0 for record in good.values())


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("mtime", [0, 1.5])
def test_every_way_of_writing_a_header(tmp_path: Path, form: int, mtime: float) -> None:
    """What is read without tarfile is what tarfile reads."""
    names = ["a.png", "ünï.png", "d" * 90 + "/" + "e" * 90 + ".png", "last.png"]
    if form != tarfile.USTAR_FORMAT:
        names.insert(2, "f" * 300 + ".png")
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=form) as archive:
        folder = tarfile.TarInfo("d.png")  # named as an image is
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for index, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = 500 * index, mtime
            archive.addfile(info, io.BytesIO(bytes([index]) * info.size))
    with tarfile.open(path) as archive:
        wanted = {
            f"a.tar/{member.name.rpartition('.')[0]}": archive.extractfile(member).read()  # type: ignore[union-attr]
            for member in archive
            if member.isfile()
        }
    assert contents(Inputs([path])) == wanted and len(wanted) == len(names)
    data = bytearray(path.read_bytes())
    data[5] ^= 1  # of the first name: its checksum is wrong
    path.write_bytes(data)
    with pytest.raises(InputError, match="bad checksum"):
        Inputs([path])
