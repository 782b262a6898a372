"""Official trees of known data sets, as folders and as archives."""

from __future__ import annotations

import shutil
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from fastast.data import AudioDataset, Listing, list_clips

RATE = 16000
Pack = Callable[[Path], Path]


def write_audio(path: Path, value: float = 0.25, seconds: float = 0.05) -> None:
    """A file of one value, exact in 16 bits where it is a multiple of 1/32768."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.full(int(seconds * RATE), value, np.float32), RATE)


def as_folder(folder: Path) -> Path:
    return folder


def as_zip(folder: Path) -> Path:
    return Path(shutil.make_archive(str(folder), "zip", folder))


def as_tar_gz(folder: Path) -> Path:
    # From "." inside, which names members "./a/b", as Speech Commands' own archive does.
    path = folder.with_name(folder.name + ".tar.gz")
    with tarfile.open(path, "w:gz") as archive:
        archive.add(folder, ".")
    return path


def as_wrapped_zip(folder: Path) -> Path:
    """All below one folder, with what macOS adds, as downloads of GitHub have it."""
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*")):
            name = f"{folder.name}-master/{file.relative_to(folder).as_posix()}"
            archive.write(file, name)
            if file.suffix == ".wav":
                archive.writestr(f"__MACOSX/{name}", b"resource fork")
    return path


@pytest.fixture(params=[as_folder, as_zip, as_tar_gz, as_wrapped_zip])
def pack(request: pytest.FixtureRequest) -> Pack:
    return request.param


def counts(listing: Listing) -> dict[tuple[str, str], int]:
    return Counter((clip.split, listing.labels[clip.target[0]]) for clip in listing.clips)


def esc50(root: Path) -> Path:
    rows = ["filename,fold,target,category,esc10,src_file,take"]
    classes = [(0, "dog", True), (3, "cow", False), (10, "rain", True), (12, "fire", True)]
    for fold in range(1, 6):
        for target, category, esc10 in classes:
            name = f"{fold}-1-A-{target}.wav"
            write_audio(root / "audio" / name, target / 32)
            rows.append(f"{name},{fold},{target},{category},{esc10},1,A")
    (root / "meta").mkdir()
    (root / "meta" / "esc50.csv").write_text("\n".join(rows) + "\n")
    (root / "README.md").write_text("ESC-50")
    return root


def test_esc50(tmp_path: Path, pack: Pack) -> None:
    data = pack(esc50(tmp_path / "ESC-50"))
    listing = list_clips(data)
    assert listing.splits == ("1", "2", "3", "4", "5")
    assert len(listing.labels) == 13
    assert (listing.labels[0], listing.labels[3], listing.labels[10]) == ("dog", "cow", "rain")
    fold = AudioDataset.load(listing, "2")
    assert fold.targets.tolist() == [0, 3, 10, 12]
    assert [float(fold.waveforms[i][0]) * 32 for i in range(4)] == [0, 3, 10, 12]
    assert len(AudioDataset.load(listing, "!2")) == 16


def test_esc10_renumbers(tmp_path: Path) -> None:
    root = esc50(tmp_path / "ESC-50")
    listing = list_clips(root, subset="esc10")
    assert listing.labels == ("dog", "rain", "fire")
    assert [clip.target for clip in listing.select("1")] == [(0,), (1,), (2,)]
    assert [clip.name for clip in listing.select("1")] == [
        "1-1-A-0.wav",
        "1-1-A-10.wav",
        "1-1-A-12.wav",
    ]
    rows = list_clips(root, where="category=rain")
    assert {clip.target for clip in rows.clips} == {(10,)}
    assert list_clips(tmp_path, subset="esc10").labels == listing.labels  # one folder down


def speech_commands(root: Path) -> Path:
    lists: dict[str, list[str]] = {"validation_list.txt": [], "testing_list.txt": []}
    for word in ("yes", "no", "go", "stop", "bed", "cat", "dog"):
        for i in range(20):
            name = f"{word}/{i:08x}_nohash_0.wav"
            write_audio(root / name)
            if i >= 15:
                lists["validation_list.txt" if i < 18 else "testing_list.txt"].append(name)
    for name, names in lists.items():
        (root / name).write_text("\n".join(names) + "\n")
    for name, seconds in (("white", 20), ("hum", 40), ("blip", 1.2)):
        ramp = np.arange(int(seconds * RATE)) / (50 * RATE)  # its value says its place
        path = root / "_background_noise_" / f"{name}.wav"
        path.parent.mkdir(exist_ok=True)
        soundfile.write(path, ramp, RATE, subtype="FLOAT")
    (root / "_background_noise_" / "README.md").write_text("noise")
    return root


def test_speech_commands(tmp_path: Path, pack: Pack) -> None:
    listing = list_clips(pack(speech_commands(tmp_path / "sc")))
    assert listing.labels == ("bed", "cat", "dog", "go", "no", "stop", "yes")
    for word in listing.labels:
        by_split = [counts(listing)[split, word] for split in ("train", "val", "test")]
        assert by_split == [15, 3, 2]
    assert [clip.name for clip in listing.select("test")][:2] == [
        "bed/00000012_nohash_0.wav",
        "bed/00000013_nohash_0.wav",
    ]
    assert len(AudioDataset.load(listing, "test")) == 14


def test_keywords(tmp_path: Path) -> None:
    root = speech_commands(tmp_path / "sc")
    listing = list_clips(root, subset="kws12")
    assert listing.labels == (
        *("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go"),
        *("_silence_", "_unknown_"),
    )
    found = counts(listing)
    # Four of the ten words are there, 15, 3 and 2 clips of each: a tenth of 60, 12 and 8.
    for split, word, share in (("train", 15, 6), ("val", 3, 2), ("test", 2, 1)):
        assert [found[split, w] for w in ("yes", "no", "go", "stop")] == [word] * 4
        assert found[split, "_unknown_"] == found[split, "_silence_"] == share
    unknown = {c.name for c in listing.clips if c.target == (11,)}
    assert {name.split("/")[0] for name in unknown} <= {"bed", "cat", "dog"}
    again = list_clips(as_zip(root), subset="kws12")
    assert {c.name for c in again.clips if c.target == (11,)} == unknown
    assert again.clips == listing.clips


def test_silence_is_apart(tmp_path: Path) -> None:
    """The ramp of the noise files says where a piece comes from: no second is in two splits."""
    listing = list_clips(speech_commands(tmp_path / "sc"), subset="kws12")
    limits = {"train": (0.0, 0.8), "val": (0.8, 0.9), "test": (0.9, 1.0)}
    seconds = {"white": 20, "hum": 40}
    for split, (first, last) in limits.items():
        data = AudioDataset.load(listing, split)
        pieces = [i for i in range(len(data)) if data.targets[i] == 10]
        names = [data.names[i].split("/")[1].split(".")[0] for i in pieces]
        assert set(names) <= set(seconds)  # blip has less than a second for each split
        starts = []
        for i, name in zip(pieces, names, strict=True):
            wave = np.asarray(data.waveforms[i]) * 50
            assert len(wave) == RATE
            assert wave[0] >= first * seconds[name] - 1e-3
            assert wave[-1] <= last * seconds[name] + 1e-3
            starts.append((name, round(float(wave[0]), 3)))
        assert len(set(starts)) == len(starts)
        if split == "train":  # three of each file: at the ends and the middle of what may be used
            assert sorted(s for n, s in starts if n == "white") == [0, 7.5, 15]
            assert sorted(s for n, s in starts if n == "hum") == [0, 15.5, 31]


def test_keywords_need_noise(tmp_path: Path) -> None:
    root = speech_commands(tmp_path / "sc")
    for name in ("white", "hum"):
        (root / "_background_noise_" / f"{name}.wav").unlink()
    with pytest.raises(ValueError, match="at least 10 s in _background_noise_"):
        list_clips(root, subset="kws12")
    assert len(list_clips(root).clips) == 140


def test_fsdd(tmp_path: Path, pack: Pack) -> None:
    root = tmp_path / "fsdd"
    for digit in (3, 7):
        for index in (0, 4, 5, 49):
            write_audio(root / "recordings" / f"{digit}_some_one_{index}.wav", digit / 32)
    (root / "metadata.py").write_text("")
    listing = list_clips(pack(root))
    assert listing.labels == tuple("0123456789")
    names = [clip.name for clip in listing.select("test")]
    assert [name.rsplit("/")[-1][-5] for name in names] == ["0", "4", "0", "4"]
    train = AudioDataset.load(listing, "train")
    assert train.targets.tolist() == [3, 3, 7, 7]
    assert float(train.waveforms[2][0]) == 7 / 32


HEADER = "# Segments csv created Sun Mar  5 10:54:31 2017\n# num_ytids={n}\n"
SEGMENTS = "# YTID, start_seconds, end_seconds, positive_labels\n"
CLASSES = """index,mid,display_name
0,/m/09x0r,"Speech"
1,/m/05zppz,"Male speech, man speaking"
2,/t/dd00088,"Gargling"
3,/m/0jbk,"Animal"
"""


def audioset(root: Path) -> Path:
    root.mkdir(parents=True)
    (root / "class_labels_indices.csv").write_text(CLASSES)
    (root / "balanced_train_segments.csv").write_text(
        HEADER
        + SEGMENTS
        + '--PJHxphWEs, 30.000, 40.000, "/m/09x0r,/t/dd00088"\n'
        + 'Yabcdefgh_1, 0.000, 10.000, "/m/0jbk"\n'
        + 'missing----, 0.000, 10.000, "/m/0jbk"\n'
        + '_2345678_30, 21.500, 31.500, "/m/05zppz"\n'
    )
    (root / "eval_segments.csv").write_text(
        HEADER + SEGMENTS + 'ABCDEFGHIJK, 7.000, 17.000, "/m/05zppz,/m/09x0r"\n'
    )
    write_audio(root / "train" / "--PJHxphWEs_30.000.wav", 1 / 32)
    write_audio(root / "train" / "YYabcdefgh_1.flac", 2 / 32)
    write_audio(root / "train" / "_2345678_30_21500_31500.wav", 3 / 32)
    write_audio(root / "train" / "not wanted.wav")
    write_audio(root / "eval" / "ABCDEFGHIJK.wav", 4 / 32)
    return root


def test_audioset(tmp_path: Path, pack: Pack) -> None:
    data = pack(audioset(tmp_path / "audioset"))
    with pytest.warns(UserWarning, match="3 of 4 clips found for balanced_train") as record:
        listing = list_clips(data)
    assert len(record) == 1
    assert listing.labels == ("Speech", "Male speech, man speaking", "Gargling", "Animal")
    assert listing.splits == ("balanced_train_segments", "eval_segments")
    assert listing.multi_label
    train = AudioDataset.load(listing, "balanced_train_segments")
    assert train.targets.tolist() == [[1, 0, 1, 0], [0, 0, 0, 1], [0, 1, 0, 0]]
    assert [float(train.waveforms[i][0]) * 32 for i in range(3)] == [1, 2, 3]
    test = AudioDataset.load(listing, "eval_segments").batch([0], 4)
    assert test.target.tolist() == [[1, 1, 0, 0]]
    assert test.target.dtype.is_floating_point


def test_audioset_with_clips_elsewhere(tmp_path: Path) -> None:
    root = audioset(tmp_path / "csvs")
    shutil.move(root / "eval", tmp_path / "clips")
    listing = list_clips(root / "eval_segments.csv", roots=[tmp_path / "clips"])
    assert [clip.name for clip in listing.clips] == ["ABCDEFGHIJK.wav"]
    assert listing.splits == ("eval_segments",)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match="0 of 1 clips found for eval_segments"):
        list_clips(root / "eval_segments.csv", roots=[tmp_path / "nothing"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('ABCDEFGHIJK, 0, 10, "/m/nope"', "row 3: label '/m/nope' is not in class_labels"),
        ('ABCDEFGHIJK, 0, 10, ""', "row 3: has no label"),
        ("ABCDEFGHIJK, 0, 10, /m/0jbk, /m/09x0r", "row 3: must be YTID.*it has 5 columns"),
    ],
)
def test_bad_segments(tmp_path: Path, row: str, message: str) -> None:
    root = audioset(tmp_path / "audioset")
    text = "# one comment\n" + SEGMENTS + row + "\n"
    (root / "eval_segments.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        list_clips(root / "eval_segments.csv")


def test_options_that_do_not_fit(tmp_path: Path) -> None:
    root = esc50(tmp_path / "ESC-50")
    for options, message in (
        ({"subset": "esc11"}, "subset must be '' or one of esc10, kws12, not 'esc11'"),
        ({"subset": "kws12"}, "subset 'kws12' is not one of ESC-50: it has esc10"),
        ({"where": "mood=good"}, "where 'mood' is not in the csv"),
        ({"where": "fold=6"}, "no row of csv meta/esc50.csv has this value"),
        ({"where": "fold"}, "where must be 'column=value', not 'fold'"),
    ):
        with pytest.raises(ValueError, match=message):
            list_clips(root, **options)
    write_audio(tmp_path / "classes" / "a" / "x.wav")
    write_audio(tmp_path / "classes" / "b" / "x.wav")
    with pytest.raises(ValueError, match=r"where 'a=b': data .*classes has no csv"):
        list_clips(tmp_path / "classes", where="a=b")
    with pytest.raises(ValueError, match="Speech Commands has no csv"):
        list_clips(speech_commands(tmp_path / "sc"), where="a=b")


def test_class_folders_in_archives(tmp_path: Path, pack: Pack) -> None:
    root = tmp_path / "set"
    for split in ("train", "test"):
        for label in ("low", "high"):
            write_audio(root / split / label / "deep" / "0.wav")
    (root / "train" / "empty").mkdir()
    write_audio(root / "train" / "beside.wav")
    listing = list_clips(pack(root))
    assert listing.labels == ("high", "low")
    assert counts(listing) == {(s, c): 1 for s in ("train", "test") for c in ("high", "low")}


def test_csv_in_an_archive(tmp_path: Path, pack: Pack) -> None:
    write_audio(tmp_path / "set" / "sounds" / "a.wav", 5 / 32)
    (tmp_path / "set" / "list.csv").write_text("file,label,split\nsounds/a.wav,x,train\n")
    data = AudioDataset.load(list_clips(pack(tmp_path / "set")), "train")
    assert float(data.waveforms[0][0]) == 5 / 32


def test_damaged_archives(tmp_path: Path) -> None:
    whole = as_tar_gz(esc50(tmp_path / "ESC-50")).read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "not.zip").write_bytes(b"no zip")
    for name in ("cut.tar.gz", "not.zip"):
        with pytest.raises(ValueError, match=name):
            list_clips(tmp_path / name)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("-1", "row 3: label -1 is negative"),
        ("4", "row 3: label 4 is not below 4, the number of classes"),
    ],
)
def test_labels_out_of_range(tmp_path: Path, label: str, message: str) -> None:
    (tmp_path / "x.csv").write_text(f"file,label,split\na.wav,1,train\nb.wav,{label},train\n")
    (tmp_path / "class_labels_indices.csv").write_text(CLASSES)
    with pytest.raises(ValueError, match=message):
        list_clips(tmp_path)


def test_labels_without_a_list_of_classes(tmp_path: Path) -> None:
    table = tmp_path / "x.csv"
    table.write_text("file,label,split\na.wav,1,train\nb.wav,-1,train\n")
    with pytest.raises(ValueError, match="row 3: label -1 is negative"):
        list_clips(tmp_path)
    table.write_text("file,label,split\na.wav,1,train\nb.wav,100000,train\n")
    with pytest.raises(ValueError, match="row 3: label 100000 is no class number"):
        list_clips(tmp_path)
    table.write_text("file,label,split\na.wav,1,train\nb.wav,3,train\n")
    assert list_clips(tmp_path).labels == ("0", "1", "2", "3")


def test_list_of_classes_beside_a_csv(tmp_path: Path) -> None:
    (tmp_path / "class_labels_indices.csv").write_text(CLASSES)
    table = tmp_path / "x.csv"
    table.write_text("file,label,split\na.wav,2,train\nb.wav,0;3,train\n")
    listing = list_clips(tmp_path)
    assert listing.labels[2] == "Gargling"
    assert [clip.target for clip in listing.clips] == [(2,), (0, 3)]
    table.write_text("file,label,split\na.wav,/m/0jbk,train\nb.wav,Gargling,train\n")
    assert [clip.target for clip in list_clips(tmp_path).clips] == [(3,), (2,)]
    table.write_text("file,label,split\na.wav,Gurgling,train\n")
    with pytest.raises(ValueError, match="row 2: label 'Gurgling' is not in class_labels"):
        list_clips(tmp_path)


def test_where_comes_first(tmp_path: Path) -> None:
    table = tmp_path / "x.csv"
    table.write_text(
        "file,label,split,use\na.wav,dog,train,yes\nb.wav,,train,no\nc.wav,cat,test,yes\n"
    )
    with pytest.raises(ValueError, match="row 3"):
        list_clips(tmp_path)
    listing = list_clips(tmp_path, where="use=yes")
    assert [clip.name for clip in listing.clips] == ["a.wav", "c.wav"]
    assert listing.labels == ("cat", "dog")
