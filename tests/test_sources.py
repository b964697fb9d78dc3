"Labelled pictures in folders, archives, tables and Parquet: the same rows from each, and nothing lost in silence."

import csv
import io
import json
import logging
import os
import subprocess
import sys
import tarfile
import time
import unicodedata
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from eurosat_mlops.core import EurosatError
from eurosat_mlops.data import MAX_BYTES
from eurosat_mlops.sources import Pictures, open_pictures

TREE = ("train/cat/1.png", "train/dog/2.png", "test/cat/3.png", "test/dog/4.png")
ARCHIVES = {"zip": "", "tar": "w", "tar.gz": "w:gz", "tgz": "w:gz", "tar.xz": "w:xz", "tar.bz2": "w:bz2"}


def picture(number: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (number % 256, number // 256, 9)).save(file, "PNG")
    return file.getvalue()


def fill(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(number))
    return folder


def pack(folder: Path, target: Path, below: str = "") -> Path:
    files = sorted((file for file in folder.rglob("*")), reverse=True)
    if target.suffix == ".zip":
        with zipfile.ZipFile(target, "w") as archive:
            for file in files:
                archive.write(file, f"{below}{file.relative_to(folder)}")
    else:
        with tarfile.open(target, ARCHIVES[target.name.partition(".")[2]]) as archive:
            for file in files:
                archive.add(file, f"{below}{file.relative_to(folder)}", recursive=False)
    return target


def look(path: Path) -> tuple[Pictures, list[bytes]]:
    "What is in a source, and the bytes of its rows, read in the order it asks for."
    with open_pictures(path) as pictures:
        content = {row: pictures.read(row) for row in pictures.order}
    assert list(pictures.names) == sorted(set(pictures.names))
    assert sorted(pictures.order) == list(range(len(pictures.names)))
    assert len(pictures.names) == len(pictures.labels) == len(pictures.parts)
    return pictures, [content[row] for row in range(len(content))]


def left_out(path: Path) -> dict[str, str]:
    return dict(look(path)[0].left_out)


def refusal(path: Path) -> str:
    with pytest.raises(EurosatError) as caught, open_pictures(path):
        pass
    return str(caught.value)


class TestFoldersAndArchives:
    @pytest.mark.parametrize("suffix", ARCHIVES)
    @pytest.mark.parametrize("below", ["", "./", "a set/v 1/"])
    def test_every_container_gives_the_same_rows(self, tmp_path, suffix, below):
        folder = fill(tmp_path / "set", *TREE)
        (folder / "train/notes.txt").write_text("x")
        (folder / "train/empty").mkdir()
        plain, packed = look(folder), look(pack(folder, tmp_path / f"set.{suffix}", below))
        assert plain[0].names == packed[0].names == tuple(sorted(TREE))
        assert plain[0].labels == packed[0].labels == ("cat", "dog", "cat", "dog")
        assert plain[0].parts == packed[0].parts == ("test", "test", "train", "train")
        assert plain[1] == packed[1] and len(set(plain[1])) == 4
        reasons = {Path(name).name: why for name, why in packed[0].left_out}
        assert reasons == {"notes.txt": "no picture", "empty": "no picture in it"}

    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            (("Train", "VAL", "test"), {"train", "val", "test"}),
            (("training", "validation", "testing"), {"train", "val", "test"}),
            (("train", "dev"), {"train", "val"}),
            (("train", "valid", "val"), {"train", "val"}),
            (("train",), {""}),
            (("train", "other"), {""}),
        ],
    )
    def test_parts_are_known_by_their_usual_names(self, tmp_path, words, expected):
        folder = fill(tmp_path, *(f"{word}/{label}/{word}{label}.png" for word in words for label in "ab"))
        pictures, _ = look(folder)
        assert set(pictures.parts) == expected and set(pictures.labels) == {"a", "b"}

    def test_a_split_that_is_not_taken_is_said(self, tmp_path, caplog):
        with caplog.at_level(logging.WARNING, "eurosat"):
            pictures, _ = look(fill(tmp_path, *TREE, "extra/cat/5.png"))
        assert set(pictures.parts) == {""} and "test, train are no split, since extra lies beside" in caplog.text

    def test_a_class_may_be_missing_from_a_part(self, tmp_path):
        pictures, _ = look(fill(tmp_path, *TREE, "train/owl/5.png"))
        assert Counter(zip(pictures.parts, pictures.labels, strict=True))[("test", "owl")] == 0
        assert pictures.labels[pictures.names.index("train/owl/5.png")] == "owl"

    def test_loose_pictures_neither_count_nor_spoil_the_split(self, tmp_path):
        pictures, _ = look(fill(tmp_path, *(f"set/{name}" for name in TREE), "logo.png", "set/a.png", "set/test/b.png"))
        assert pictures.names == tuple(sorted(TREE)) and set(pictures.parts) == {"train", "test"}
        assert dict(pictures.left_out) == dict.fromkeys(
            ("logo.png", "set/a.png", "set/test/b.png"), "in no class folder"
        )

    def test_the_class_is_the_folder_that_a_picture_lies_in(self, tmp_path):
        pictures, _ = look(fill(tmp_path, "pets/cat/1.png", "pets/dog/2.png", "plants/rose/red/3.png"))
        assert dict(zip(pictures.names, pictures.labels, strict=True)) == {
            "pets/cat/1.png": "cat",
            "pets/dog/2.png": "dog",
            "plants/rose/red/3.png": "red",
        }

    def test_classes_called_like_parts_are_refused(self, tmp_path):
        folder = fill(tmp_path, "cat/train/1.png", "cat/test/2.png", "dog/train/3.png", "dog/test/4.png")
        assert "its classes are called" in refusal(folder)

    def test_names_keep_their_letters_and_classes_their_unity(self, tmp_path):
        composed, parted = "Café crème", unicodedata.normalize("NFD", "Café crème")
        assert composed != parted
        folder = fill(tmp_path / "set", f"train/{composed}/a b.png", f"test/{parted}/日本 1.png", "train/Öl/3.png")
        for source in (folder, pack(folder, tmp_path / "set.zip"), pack(folder, tmp_path / "set.tgz")):
            pictures, _ = look(source)
            assert set(pictures.labels) == {composed, "Öl"} and f"test/{parted}/日本 1.png" in pictures.names

    def test_hidden_files_are_passed_over(self, tmp_path):
        folder = fill(tmp_path, *TREE, "__MACOSX/train/cat/._1.png", ".cache/cat/1.png", "train/cat/.hidden.png")
        assert look(folder)[0].left_out == ()

    @pytest.mark.skipif(os.name != "posix", reason="links and pipes of POSIX")
    @pytest.mark.parametrize("suffix", ["", "tar", "tgz"])
    def test_links_and_pipes_are_said_and_never_followed(self, tmp_path, suffix):
        folder, secret = fill(tmp_path / "set", *TREE), fill(tmp_path / "secret", "x/1.png")
        (folder / "train/cat/file.png").symlink_to(secret / "x/1.png")
        (folder / "train/cat/broken.png").symlink_to("nowhere.png")
        (folder / "train/owl").symlink_to(secret / "x")
        (folder / "loop").symlink_to(folder)
        os.mkfifo(folder / "train/cat/pipe.png")
        pictures, _ = look(pack(folder, tmp_path / f"set.{suffix}") if suffix else folder)
        assert pictures.names == tuple(sorted(TREE)) and set(pictures.parts) == {"train", "test"}
        links = ("train/cat/file.png", "train/cat/broken.png", "train/owl", "loop")
        assert dict(pictures.left_out) == {**dict.fromkeys(links, "a link"), "train/cat/pipe.png": "no plain file"}

    def test_hard_links_in_a_tar_and_links_in_a_zip_are_said(self, tmp_path):
        folder = fill(tmp_path / "set", "cat/1.png", "dog/2.png")
        os.link(folder / "cat/1.png", folder / "cat/3.png")
        pictures, _ = look(pack(folder, tmp_path / "set.tar"))
        assert "a link" in dict(pictures.left_out).values() and len(pictures.names) == 2
        link = zipfile.ZipInfo("cat/4.png")
        link.external_attr = 0o120777 << 16
        with zipfile.ZipFile(pack(folder, tmp_path / "set.zip"), "a") as archive:
            archive.writestr(link, "/etc/passwd")
        assert left_out(tmp_path / "set.zip") == {"cat/4.png": "a link"}

    @pytest.mark.parametrize(
        "name", ["../cat/1.png", "/cat/1.png", "a/../../cat/1.png", "C:/cat/1.png", "a\\cat\\1.png"]
    )
    @pytest.mark.parametrize("kind", ["zip", "tar"])
    def test_names_that_point_out_of_an_archive_are_refused(self, tmp_path, name, kind):
        path = tmp_path / f"evil.{kind}"
        if kind == "zip":
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr(name, picture())
        else:
            with tarfile.open(path, "w") as archive:
                archive.addfile(info := tarfile.TarInfo(name), io.BytesIO(bytes(info.size)))
        assert "points out of the archive" in refusal(path)

    def test_a_bomb_stops_itself_alone(self, tmp_path):
        folder = fill(tmp_path / "set", "cat/1.png", "dog/2.png")
        (folder / "cat/bomb.png").write_bytes(bytes(MAX_BYTES + 1))
        with zipfile.ZipFile(tmp_path / "set.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for file in sorted(folder.rglob("*.png")):
                archive.write(file, file.relative_to(folder))
        for source in (folder, tmp_path / "set.zip", pack(folder, tmp_path / "set.tgz")):
            with open_pictures(source) as pictures:
                row = pictures.names.index("cat/bomb.png")
                with pytest.raises(EurosatError, match=r"16,777,217 bytes, expected at most 16,777,216"):
                    pictures.read(row)
                assert [len(pictures.read(other)) < 999 for other in pictures.order if other != row] == [True, True]

    def test_a_sparse_file_in_a_tar_is_not_blown_up(self, tmp_path):
        folder = fill(tmp_path / "set", "cat/1.png", "dog/2.png")
        with open(folder / "cat/holes.png", "wb") as file:
            file.truncate(1 << 40)
        done = subprocess.run(["tar", "-Scf", tmp_path / "set.tar", "-C", folder, "."], capture_output=True)
        if done.returncode:
            pytest.skip("no tar that packs holes")
        assert left_out(tmp_path / "set.tar") == {"cat/holes.png": "no plain file"}

    @pytest.mark.filterwarnings("ignore:Duplicate name")
    def test_the_last_of_two_members_of_one_name_counts(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
            for name, number in (("cat/1.png", 1), ("dog/1.png", 2), ("cat/1.png", 3)):
                archive.writestr(name, picture(number))
        pictures, content = look(tmp_path / "set.zip")
        assert content == [picture(3), picture(2)]
        assert pictures.left_out == (("cat/1.png", "replaced by a later file of that name"),)

    @pytest.mark.skipif(sys.platform != "linux", reason="file names of any bytes")
    def test_a_name_that_is_no_unicode_is_left_out(self, tmp_path):
        folder = fill(tmp_path / "set", "cat/1.png", "dog/2.png")
        Path(os.fsdecode(os.fsencode(folder) + b"/cat/\xff.png")).write_bytes(picture())
        for source in (folder, pack(folder, tmp_path / "set.tar")):
            assert left_out(source) == {"cat/\\udcff.png": "its name is no UTF-8"}
            json.dumps(look(source)[0].left_out, ensure_ascii=False).encode()

    @pytest.mark.parametrize("suffix", ["zip", "tar", "tgz"])
    def test_an_archive_cut_anywhere_is_never_taken_for_whole(self, tmp_path, suffix):
        whole = pack(fill(tmp_path / "set", *TREE), tmp_path / f"set.{suffix}").read_bytes()
        end = len(whole.rstrip(b"\0")) if suffix == "tar" else len(whole)  # a tar ends in any number of empty blocks
        for size in range(0, end, 37):
            (tmp_path / f"cut.{suffix}").write_bytes(whole[:size])
            with pytest.raises(EurosatError):
                look(tmp_path / f"cut.{suffix}")

    @pytest.mark.parametrize("suffix", ["zip", "tar", "tgz"])
    def test_damage_ends_in_an_error_for_people_or_is_none(self, tmp_path, suffix):
        whole = bytearray(pack(fill(tmp_path / "set", *TREE), tmp_path / f"set.{suffix}").read_bytes())
        for place in range(0, min(len(whole), 6000), 41):
            damaged = bytearray(whole)
            damaged[place] ^= 0xFF
            (tmp_path / f"bad.{suffix}").write_bytes(damaged)
            try:
                look(tmp_path / f"bad.{suffix}")
            except EurosatError:
                continue

    def test_a_packed_tar_is_read_from_front_to_back(self, tmp_path):
        with tarfile.open(tmp_path / "set.tar.gz", "w:gz") as archive:
            for number in range(2000):
                data = picture(number) + os.urandom(3000)
                info = tarfile.TarInfo(f"{'dog' if number % 2 else 'cat'}/{1999 - number}.png")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        start = time.process_time()
        pictures, content = look(tmp_path / "set.tar.gz")
        assert time.process_time() - start < 2
        assert all(
            data.startswith(picture(1999 - int(Path(name).stem)))
            for name, data in zip(pictures.names, content, strict=True)
        )

    def test_what_is_not_there_or_nothing_is_said(self, tmp_path):
        assert "no such file" in refusal(tmp_path / "nowhere")
        assert "no such file" in refusal(tmp_path / "nowhere.csv")
        (tmp_path / "empty").mkdir()
        assert "no labelled picture in it" in refusal(tmp_path / "empty")
        (tmp_path / "empty.zip").write_bytes(b"")
        assert "not a zip, or cut short, and no tar" in refusal(tmp_path / "empty.zip")

    def test_the_state_changes_when_a_file_does(self, tmp_path):
        folder = fill(tmp_path / "set", *TREE)
        first = look(folder)[0].state
        assert look(folder)[0].state == first
        os.utime(folder / TREE[0], (1e9, 1e9))
        second = look(folder)[0].state
        (folder / TREE[0]).rename(folder / "train/dog/1.png")
        assert len({first, second, look(folder)[0].state}) == 3
        packed = pack(folder, tmp_path / "set.zip")
        third = look(packed)[0].state
        os.utime(packed, ns=(0, 1))
        assert look(packed)[0].state != third

    def test_the_real_sample_keeps_its_split(self, project):
        sample = project.parent / "shared" / "data" / "cifake_sample.zip"
        if not sample.exists():
            pytest.skip("the CIFAKE sample is not here")
        pictures, content = look(sample)
        counts = Counter(zip(pictures.parts, pictures.labels, strict=True))
        assert counts == {(p, c): n for p, n in (("train", 1000), ("test", 500)) for c in ("FAKE", "REAL")}
        assert all(data.startswith(b"\xff\xd8") for data in content) and pictures.left_out == ()


def table(folder: Path, text: str, name: str = "index.csv", code: str = "utf-8") -> Path:
    (folder / name).write_bytes(text.encode(code))
    return folder / name

    def test_too_many_files_are_refused(self, tmp_path, monkeypatch):
        monkeypatch.setattr("eurosat_mlops.archives.MAX_FILES", 3)
        assert "more than 3 files" in refusal(fill(tmp_path, *TREE))


class TestTables:
    @pytest.mark.parametrize("code", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
    @pytest.mark.parametrize("delimiter", [",", ";", "\t"])
    @pytest.mark.parametrize("end", ["\n", "\r\n"])
    def test_any_unicode_and_any_delimiter_is_read(self, tmp_path, code, delimiter, end):
        fill(tmp_path, "bilder/größe 1.png", "bilder/2.png")
        rows = (("Image", "Class"), ("bilder/größe 1.png", "Öl"), ("bilder/2.png", "日本"))
        mark = "\ufeff" if code in ("utf-16-le", "utf-16-be") else ""
        pictures, content = look(table(tmp_path, mark + end.join(map(delimiter.join, rows)) + end, code=code))
        assert dict(zip(pictures.names, pictures.labels, strict=True)) == {"2.png": "日本", "größe 1.png": "Öl"}
        assert content == [picture(1), picture(0)] and pictures.left_out == ()

    @pytest.mark.parametrize("code", ["latin-1", "cp1252", "shift-jis"])
    def test_letters_that_would_be_guessed_are_refused(self, tmp_path, code):
        text = "path,label\na.png,日本\n" if code == "shift-jis" else "path,label\na.png,Übung\n"
        assert "cannot be read as UTF-8 or UTF-16" in refusal(table(tmp_path, text, code=code))

    @pytest.mark.parametrize("picture_column", ["path", "File", "FILENAME", "file_name", "image", "name"])
    @pytest.mark.parametrize("class_column", ["label", "Class", "category", "TARGET"])
    @pytest.mark.parametrize("part_column", ["part", "Split", "set", "subset"])
    def test_columns_are_known_by_their_usual_names(self, tmp_path, picture_column, class_column, part_column):
        fill(tmp_path, "1.png", "2.png")
        text = f"id,{part_column},{class_column},{picture_column}\n7,Training,3,1.png\n8,validation,10,2.png\n"
        pictures, _ = look(table(tmp_path, text))
        assert (pictures.labels, pictures.parts) == (("3", "10"), ("train", "val"))

    def test_paths_may_be_absolute_quoted_from_windows_or_point_up(self, tmp_path):
        fill(tmp_path, "a/1, one.png", "b/2.png", "b/c/3.png")
        (tmp_path / "tables").mkdir()
        with open(tmp_path / "tables/index.tsv", "w", newline="") as file:
            csv.writer(file, delimiter="\t").writerows(
                [("path", "label"), (tmp_path / "a/1, one.png", "x"), ("..\\b\\2.png", "y"), ("../b/./c/3.png", "y\nz")]
            )
        pictures, content = look(tmp_path / "tables/index.tsv")
        assert pictures.names == ("a/1, one.png", "b/2.png", "b/c/3.png") and pictures.labels == ("x", "y", "y\nz")
        assert content == [picture(0), picture(1), picture(2)]

    def test_every_row_that_does_not_count_is_said_with_its_number(self, tmp_path):
        fill(tmp_path, *(f"{number}.png" for number in range(1, 8)))
        (tmp_path / "6.png").unlink()
        (tmp_path / "6.png").symlink_to("1.png")
        rows = [
            "path,label,split",
            "1.png,cat,train",
            "",
            "./1.png,cat,train",  # row 4: again
            "2.png,,train",
            "3.png,dog,test",
            "3.png,cat,test",  # row 7: another class
            "gone.png,dog,test",
            ",dog,test",
            "4.png,dog,test,more",
            "5.png,dog,",
            "6.png,dog,test",
            ".,dog,test",
            "7.png,dog,test",
        ]
        pictures, _ = look(table(tmp_path, "\n".join(rows)))
        assert pictures.names == ("1.png", "7.png") and pictures.parts == ("train", "test")
        assert sorted(pictures.left_out) == sorted(
            [
                ("./1.png", "row 4: again, as in row 2"),
                ("2.png", "row 5: no class"),
                ("3.png", "row 6, row 7: not the same class or part"),
                ("gone.png", "row 8: No such file or directory"),
                ("row 9", "names no picture"),
                ("row 10", "4 values for 3 columns"),
                ("5.png", "row 11: no part"),
                ("6.png", "row 12: a link"),
                (".", "row 13: no plain file"),
            ]
        )

    @pytest.mark.parametrize(
        ("text", "why"),
        [
            ("", "expected one for the picture"),
            ("path,size\n1.png,3\n", "columns path, size; expected one for the class, called label"),
            ("path,label\n", "no labelled picture in it"),
            ("path,label\nx.png,cat\n", r"x\.png: row 2: No such file"),
            ("path,label\nx\0.png,cat\n", "row 2: embedded null byte"),
            ("path,label,split\n1.png,cat,holdout\n", "row 2 has part 'holdout', expected one of train, training"),
            (f'path,label\n"{"x" * 200_000}",cat\n', "field larger than field limit"),
            (f"path,label\n{'x' * 5000}.png,cat\n", "File name too long"),
        ],
    )
    def test_a_table_of_nothing_is_refused_with_the_reason(self, tmp_path, text, why):
        fill(tmp_path, "1.png")
        with pytest.raises(EurosatError, match=why), open_pictures(table(tmp_path, text)):
            pass

    def test_a_picture_that_goes_away_or_is_too_large_stops_itself_alone(self, tmp_path):
        fill(tmp_path, "1.png", "2.png", "3.png")
        (tmp_path / "2.png").write_bytes(bytes(MAX_BYTES + 1))
        with open_pictures(table(tmp_path, "path,label\n1.png,a\n2.png,b\n3.png,b\n")) as pictures:
            (tmp_path / "1.png").unlink()
            with pytest.raises(EurosatError, match=r"1\.png: cannot be read"):
                pictures.read(0)
            with pytest.raises(EurosatError, match="16,777,217 bytes"):
                pictures.read(1)
            assert pictures.read(2) == picture(2)

    def test_the_state_changes_when_table_or_pictures_do(self, tmp_path):
        fill(tmp_path, "1.png", "2.png")
        path = table(tmp_path, "path,label\n1.png,a\n2.png,b\n")
        first = look(path)[0].state
        assert look(path)[0].state == first
        os.utime(tmp_path / "1.png", ns=(0, 1))
        second = look(path)[0].state
        os.utime(path, ns=(0, 1))
        assert len({first, second, look(path)[0].state}) == 3


def write_shard(path: Path, columns: dict[str, Any], features: dict[str, Any] | None = None, group: int = 3) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    notes = {"huggingface": json.dumps({"info": {"features": features}})} if features else None
    pq.write_table(pa.table(columns).replace_schema_metadata(notes), path, row_group_size=group)
    return path


def cells(*numbers: int, **more: Any) -> list[dict[str, Any]]:
    return [{"bytes": picture(number), "path": None, **more} for number in numbers]


FEATURES = {"img": {"_type": "Image"}, "y": {"_type": "ClassLabel", "names": ["cat", "dog"]}, "id": {"_type": "Value"}}


class TestParquet:
    def test_shards_as_hugging_face_writes_them(self, tmp_path):
        for shard, part in enumerate(("train", "train", "test")):
            numbers = range(10 * shard, 10 * shard + 7)
            columns = {"img": cells(*numbers), "y": [number % 2 for number in numbers], "id": list(numbers)}
            write_shard(tmp_path / f"data/{part}-0000{shard}-of-00003-abc.parquet", columns, FEATURES)
        fill(tmp_path, "assets/logo.png")
        pictures, content = look(tmp_path)
        assert pictures.left_out == (("assets/logo.png", "not in a Parquet file"),)
        assert Counter(pictures.parts) == {"train": 14, "test": 7}
        numbers = [10 * int(name.split("-")[1]) + int(name[-7:]) for name in pictures.names]
        assert content == [picture(number) for number in numbers]
        assert pictures.labels == tuple("dog" if number % 2 else "cat" for number in numbers)

    def test_the_names_of_the_owner_are_kept_where_they_are_unique(self, tmp_path):
        named = [cell | {"path": f"{number}.png"} for number, cell in enumerate(cells(0, 1, 2))]
        path = write_shard(tmp_path / "a.parquet", {"image": named, "label": ["x", "y", "z"]})
        assert look(path)[0].names == ("0.png", "1.png", "2.png")
        write_shard(path, {"image": cells(0, 1, 2, path="a.png"), "label": ["x", "y", "z"]})
        assert look(path)[0].names == ("a/0000000", "a/0000001", "a/0000002")

    def test_bytes_numbers_and_a_part_column(self, tmp_path):
        columns = {"image": [picture(n) for n in range(4)], "label": [3, 10, 3, None], "split": ["train", "test"] * 2}
        pictures, content = look(write_shard(tmp_path / "a.parquet", columns))
        assert pictures.labels == ("3", "10", "3") and pictures.parts == ("train", "test", "train")
        assert content == [picture(0), picture(1), picture(2)]
        assert pictures.left_out == (("a.parquet row 4", "no class"),)

    @pytest.mark.parametrize(
        "labels", [[1.0, float("nan")], [1, None], ["1", ""], pa.array(["1", None]).dictionary_encode()]
    )
    def test_classes_of_any_plain_type_are_texts(self, tmp_path, labels):
        pictures, _ = look(write_shard(tmp_path / "a.parquet", {"image": cells(0, 1), "label": labels}))
        assert pictures.labels == ("1",) and len(pictures.left_out) == 1

    def test_numbers_without_a_name_are_left_out(self, tmp_path):
        columns = {"img": cells(0, 1, 2, 3), "y": [0, 1, -1, 2]}
        pictures, _ = look(write_shard(tmp_path / "a.parquet", columns, FEATURES))
        assert pictures.labels == ("cat", "dog") and len(pictures.left_out) == 2

    def test_paths_are_a_table(self, tmp_path):
        fill(tmp_path, "p/1.png", "p/2.png")
        columns = {
            "path": ["p/1.png", "p/2.png", "p/3.png"],
            "label": ["a", "b", "b"],
            "split": ["train", "dev", "dev"],
        }
        pictures, content = look(write_shard(tmp_path / "a.parquet", columns))
        assert pictures.names == ("1.png", "2.png") and pictures.parts == ("train", "val")
        assert content == [picture(0), picture(1)]
        assert pictures.left_out == (("p/3.png", "a.parquet row 3: No such file or directory"),)

    @pytest.mark.parametrize(
        ("columns", "why"),
        [
            (
                {"image": [[1, 2], [3]], "label": ["a", "b"]},
                r"column image is list<.*expected paths or encoded pictures",
            ),
            ({"image": [cells(0), cells(1)], "label": ["a", "b"]}, "column image is list<"),
            ({"image": [{"pixels": 1}], "label": ["a"]}, "column image is struct<pixels"),
            ({"image": [1, 2], "label": ["a", "b"]}, "column image is int64"),
            ({"image": cells(0, 1), "label": [["a"], ["b"]]}, "column label is list<.*expected one class a picture"),
            ({"image": cells(0)}, "expected one for the class, called label"),
            (
                {"image": cells(0, 1), "label": ["a", "b"], "split": ["train", "x"]},
                "row 2 has part 'x', expected one of",
            ),
            ({"image": pa.array([], pa.binary()), "label": pa.array([], pa.string())}, "no labelled picture in it"),
            ({"image": pa.array([], pa.null()), "label": pa.array([], pa.null())}, "column image is null"),
        ],
    )
    def test_what_is_no_set_of_pictures_is_refused_with_the_reason(self, tmp_path, columns, why):
        with pytest.raises(EurosatError, match=why), open_pictures(write_shard(tmp_path / "a.parquet", columns)):
            pass

    @pytest.mark.parametrize(
        "notes", [b"", b"[]", b"{", b'{"info": 3}', b'{"info": {"features": {"image": 3, "label": [1]}}}']
    )
    def test_strange_notes_are_no_obstacle(self, tmp_path, notes):
        columns = pa.table({"image": cells(0, 1), "label": ["a", "b"]}).replace_schema_metadata({b"huggingface": notes})
        pq.write_table(columns, tmp_path / "a.parquet")
        assert look(tmp_path / "a.parquet")[0].labels == ("a", "b")

    def test_several_sets_in_one_folder_are_refused(self, tmp_path):
        columns = {"image": cells(0, 1), "label": ["a", "b"]}
        for name in ("one/train-0.parquet", "two/train-0.parquet"):
            write_shard(tmp_path / name, columns)
        assert "Name one folder" in refusal(tmp_path)
        write_shard(tmp_path / "one/test-0.parquet", {"image": ["a.png"], "label": ["b"]})
        assert "other columns than" in refusal(tmp_path / "one")

    def test_folders_may_be_parts(self, tmp_path):
        for part in ("train", "validation"):
            write_shard(tmp_path / part / "0000.parquet", {"image": cells(0, 1), "label": ["a", "b"]})
        assert set(look(tmp_path)[0].parts) == {"train", "val"}

    def test_a_damaged_file_ends_in_an_error_for_people(self, tmp_path):
        whole = write_shard(
            tmp_path / "a.parquet", {"image": cells(*range(9)), "label": list("abcabcabc")}
        ).read_bytes()
        for size in range(0, len(whole), 97):
            (tmp_path / "cut.parquet").write_bytes(whole[:size])
            assert "not a whole Parquet file" in refusal(tmp_path / "cut.parquet")
        for place in range(4, len(whole), 29):
            (tmp_path / "bad.parquet").write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
            try:
                look(tmp_path / "bad.parquet")
            except EurosatError:
                continue

    def test_an_empty_cell_stops_itself_alone(self, tmp_path):
        columns = {"image": [cells(0)[0], {"bytes": None, "path": "a.png"}, None, *cells(3)], "label": list("abab")}
        with open_pictures(write_shard(tmp_path / "a.parquet", columns)) as pictures:
            for row in (1, 2):
                with pytest.raises(EurosatError, match=f"row {row + 1} holds 0 bytes"):
                    pictures.read(row)
            assert pictures.read(3) == picture(3) and pictures.read(0) == picture(0)

    def test_one_enormous_row_group_takes_little_memory(self, tmp_path):
        data = [os.urandom(20_000) for _ in range(5000)]
        path = write_shard(tmp_path / "a.parquet", {"image": data, "label": list("ab") * 2500}, group=5000)
        code = (
            "import sys, pyarrow\nfrom eurosat_mlops.sources import open_pictures\n"
            "with open_pictures(sys.argv[1]) as p: total = sum(len(p.read(row)) for row in p.order)\n"
            "print(total, pyarrow.default_memory_pool().max_memory())"
        )
        done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
        total, peak = map(int, done.stdout.split())
        assert total == 100_000_000 and peak < 80_000_000
