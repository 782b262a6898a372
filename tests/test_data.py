from __future__ import annotations

import csv
import math
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from fastast.data import AudioDataset, Clip, Listing, list_clips

RATE = 16000


def tone(seconds: float, frequency: float = 440.0, rate: int = RATE) -> np.ndarray:
    time = np.arange(int(seconds * rate)) / rate
    return (0.5 * np.sin(2 * math.pi * frequency * time)).astype(np.float32)


def write_csv(path: Path, header: list[str], rows: list[list[object]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


@pytest.fixture
def zipped(tmp_path: Path) -> Path:
    """Two archives and a csv, as ESC-50 comes: folds, one of them in each archive."""
    rows = []
    for fold in (1, 2):
        with zipfile.ZipFile(tmp_path / f"fold{fold}.zip", "w") as archive:
            for i in range(4):
                name = f"{fold}-{i}.wav"
                soundfile.write(tmp_path / name, tone(0.1 * (i + 1)), RATE, subtype="FLOAT")
                archive.write(tmp_path / name, name)
                (tmp_path / name).unlink()
                rows.append([name, i % 2, ["dog", "rain"][i % 2], fold])
    write_csv(tmp_path / "meta.csv", ["filename", "target", "category", "fold"], rows)
    return tmp_path


def test_csv_with_archives(zipped: Path) -> None:
    listing = list_clips(zipped)
    assert listing.labels == ("dog", "rain")
    assert listing.splits == ("1", "2")
    data = AudioDataset.load(listing, "1")
    assert data.names == ("1-0.wav", "1-1.wav", "1-2.wav", "1-3.wav")
    assert data.lengths.tolist() == [1600, 3200, 4800, 6400]
    assert data.targets.tolist() == [0, 1, 0, 1]
    np.testing.assert_array_equal(data.waveforms[2], tone(0.3))
    assert AudioDataset.load(listing, "!1").names == ("2-0.wav", "2-1.wav", "2-2.wav", "2-3.wav")


def test_roots_can_be_named(zipped: Path) -> None:
    listing = list_clips(zipped / "meta.csv", roots=[zipped / "fold1.zip"])
    assert len(AudioDataset.load(listing, "1")) == 4
    with pytest.raises(ValueError, match=r"none of the 4 clips of split '2'.*2-0\.wav"):
        AudioDataset.load(listing, "2")


def test_resamples_and_caches_in_half_precision(tmp_path: Path) -> None:
    stereo = np.stack([tone(0.5, rate=8000), np.zeros(4000, np.float32)], axis=1)
    soundfile.write(tmp_path / "a.wav", stereo, 8000, subtype="FLOAT")
    write_csv(tmp_path / "x.csv", ["path", "label", "split"], [["a.wav", "beep", "test"]])
    listing = list_clips(tmp_path)
    full = AudioDataset.load(listing, "test")
    half = AudioDataset.load(listing, "test", cache_dtype="float16")
    assert full.lengths.tolist() == [8000]
    middle = slice(1000, 7000)
    np.testing.assert_allclose(full.waveforms[0][middle], tone(0.5)[middle] / 2, atol=2e-3)
    assert half.waveforms[0].dtype == np.float16
    np.testing.assert_allclose(half.waveforms[0], full.waveforms[0], atol=1e-3)
    assert half.batch([0], 8000).waveform.dtype == torch.float32


def test_class_folders(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("test", 1)):
        for label in ("low", "high"):
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(count):
                soundfile.write(tmp_path / split / label / f"{i}.wav", tone(0.1), RATE)
    (tmp_path / "train" / "low" / "notes.txt").write_text("not audio")
    listing = list_clips(tmp_path)
    assert listing.labels == ("high", "low")
    assert len(listing.select("train")) == 6
    assert [clip.target for clip in listing.select("test")] == [(0,), (1,)]


def test_hash_split_is_stable(tmp_path: Path) -> None:
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for i in range(60):
            soundfile.write(tmp_path / label / f"{i}.wav", tone(0.03), RATE)
    before = {clip.name: clip.split for clip in list_clips(tmp_path).clips}
    assert {"train", "test"} == set(before.values())
    assert 2 <= sum(split == "test" for split in before.values()) <= 30
    soundfile.write(tmp_path / "a" / "new.wav", tone(0.03), RATE)
    after = {clip.name: clip.split for clip in list_clips(tmp_path).clips}
    assert before.items() <= after.items()


def test_several_classes_a_clip(tmp_path: Path) -> None:
    for name in "ab":
        soundfile.write(tmp_path / f"{name}.wav", tone(0.1), RATE)
    rows = [["a.wav", "dog;rain", "train"], ["b.wav", "sun", "train"]]
    write_csv(tmp_path / "x.csv", ["file", "label", "split"], rows)
    data = AudioDataset.load(list_clips(tmp_path), "train")
    assert data.labels == ("dog", "rain", "sun")
    assert data.targets.tolist() == [[1, 1, 0], [0, 0, 1]]


def test_bad_files_are_named_and_left_out(zipped: Path) -> None:
    with zipfile.ZipFile(zipped / "fold3.zip", "w") as archive:
        archive.writestr("3-0.wav", b"no audio at all")
        archive.writestr("3-1.wav", b"")
    with (zipped / "meta.csv").open("a") as file:
        file.write("3-0.wav,0,dog,1\n3-1.wav,1,rain,1\nmissing.wav,0,dog,1\n")
    with pytest.warns(UserWarning, match="3 of 7 clips") as record:
        data = AudioDataset.load(list_clips(zipped), "1")
    for name in ("3-0.wav", "3-1.wav", "missing.wav"):
        assert name in str(record[0].message)
    assert len(data) == 4
    assert len(data.bad) == 3


def test_too_short_clips_are_left_out(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "ten_ms.wav", tone(0.01), RATE)
    soundfile.write(tmp_path / "good.wav", tone(0.1), RATE)
    rows = [["ten_ms.wav", "x", "train"], ["good.wav", "x", "train"]]
    write_csv(tmp_path / "x.csv", ["file", "label", "split"], rows)
    with pytest.warns(UserWarning, match=r"ten_ms\.wav: is 10 ms long"):
        data = AudioDataset.load(list_clips(tmp_path), "train")
    assert data.names == ("good.wav",)


def test_batches_cut_and_pad() -> None:
    waves = [np.arange(1, 6, dtype=np.float32), np.arange(10, 30, dtype=np.float32)]
    data = AudioDataset(waves, [(0,), (1,)], ["a", "b"], ["short", "long"])
    batch = data.batch([1, 0], 8)
    assert batch.waveform.tolist() == [list(range(10, 18)), [1, 2, 3, 4, 5, 0, 0, 0]]
    assert batch.lengths.tolist() == [8, 5]
    assert batch.target.tolist() == [1, 0]
    starts = {int(data.batch([1], 8, torch.tensor([s / 80])).waveform[0, 0]) for s in range(80)}
    assert min(starts) == 10
    assert max(starts) == 22  # the last place where 8 of 20 samples fit
    assert [len(b.target) for b in data.batches(1, 8)] == [1, 1]


def test_limit_and_fingerprint(zipped: Path) -> None:
    listing = list_clips(zipped)
    full, some = AudioDataset.load(listing, "1"), AudioDataset.load(listing, "1", limit=2)
    assert some.names == ("1-0.wav", "1-2.wav")
    assert full.fingerprint == AudioDataset.load(listing, "1").fingerprint
    assert full.fingerprint != some.fingerprint


@pytest.mark.parametrize(
    ("header", "row", "message"),
    [
        (["what", "label", "split"], ["a", "b", "c"], "path_column"),
        (["file", "what", "split"], ["a", "b", "c"], "target_column"),
        (["file", "label", "what"], ["a", "b", "c"], "split_column"),
        (["file", "label", "split"], ["a", "", "c"], "row 2"),
    ],
)
def test_bad_csv(tmp_path: Path, header: list[str], row: list[object], message: str) -> None:
    write_csv(tmp_path / "x.csv", header, [row])
    with pytest.raises(ValueError, match=message):
        list_clips(tmp_path)


def test_bad_data_arguments(tmp_path: Path, zipped: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        list_clips(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="neither a csv nor folders"):
        list_clips(tmp_path / "empty")
    with pytest.raises(ValueError, match="split '7' is not in the data: it has 1, 2"):
        AudioDataset.load(list_clips(zipped), "7")
    with pytest.raises(ValueError, match="target_column 'x' is not in the csv"):
        list_clips(zipped, target_column="x")
    (zipped / "second.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="several csv files"):
        list_clips(zipped)
    with pytest.raises(ValueError, match="cache_dtype"):
        AudioDataset.load(list_clips(zipped / "meta.csv"), "1", cache_dtype="int8")


@pytest.mark.parametrize(
    "splits, train, test, expected",
    [
        ("1 2 3", "", "", ("!1", "1")),
        ("1 2 3", "", "2", ("!2", "2")),
        ("test train", "", "", ("train", "test")),
        ("test train valid", "", "valid", ("train", "valid")),
        ("a b", "b", "", ("b", "a")),
    ],
)
def test_which_splits(
    zipped: Path, splits: str, train: str, test: str, expected: tuple[str, str]
) -> None:
    files = list_clips(zipped).clips[0].files
    clips = tuple(Clip(f"{name}.wav", (0,), name, files) for name in splits.split())
    assert Listing(clips, ("x",)).split_names(train, test) == expected
