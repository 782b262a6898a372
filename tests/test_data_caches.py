"""Where decoded clips come from: memory, a file on disk, or decoding when they are asked for."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from fastast.audio import AudioError
from fastast.data import AudioDataset, Clip, Listing, cache, decoding, list_clips

RATE = 16000
COUNT = 12
CACHES = ("memory", "disk", "none")


def noise(index: int) -> np.ndarray:
    """A clip of its own length, of samples that 16 bits hold exactly."""
    generator = np.random.default_rng(index)
    samples = generator.integers(-(2**15) + 1, 2**15, 800 + 37 * index)
    return (samples / 2**15).astype(np.float32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "clips"
    root.mkdir()
    rows = ["file,label,split"]
    for i in range(COUNT):
        soundfile.write(root / f"{i:02}.wav", noise(i), RATE)
        rows.append(f"{i:02}.wav,{i % 3},train")
    (root / "list.csv").write_text("\n".join(rows) + "\n")
    return root


def spoil(folder: Path, *indices: int) -> None:
    for i in indices:
        path = folder / f"{i:02}.wav"
        path.write_bytes(path.read_bytes()[:-101])  # cut off


def load(folder: Path, kind: str, **options: Any) -> AudioDataset:
    directory = str(folder.parent / "cache")
    return AudioDataset.load(
        list_clips(folder), "train", cache=kind, cache_dir=directory, **options
    )


def waves(data: AudioDataset) -> list[np.ndarray]:
    return [np.array(data.waveforms[i]) for i in range(len(data))]


def cached(folder: Path) -> dict[str, Path]:
    """The files of the one cache, by their suffix."""
    paths = (folder.parent / "cache").iterdir()
    return {path.name.partition(".")[2]: path for path in paths}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kind", CACHES)
def test_all_give_the_same_samples(folder: Path, kind: str, dtype: str) -> None:
    data = load(folder, kind, cache_dtype=dtype)
    assert data.names == tuple(f"{i:02}.wav" for i in range(COUNT))
    assert data.lengths.tolist() == [800 + 37 * i for i in range(COUNT)]
    assert data.fingerprint == load(folder, "memory").fingerprint
    for i, wave in enumerate(waves(data)):
        assert wave.dtype == dtype
        np.testing.assert_array_equal(wave, noise(i).astype(dtype))
    memory = load(folder, "memory", cache_dtype=dtype)
    asked, places = [3, 11, 3, 0], torch.tensor([0.0, 0.5, 0.999, 0.25])
    for ours, expected in zip(
        data.batch(asked, 850, places), memory.batch(asked, 850, places), strict=True
    ):
        assert torch.equal(ours, expected)
    for ours, expected in zip(data.batches(5, 900), memory.batches(5, 900), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_places() -> None:
    data = AudioDataset([np.arange(10.0), np.arange(3.0)], [(0,), (0,)], ("a",), ("x", "y"))
    for place, start in ((0.0, 0), (0.16, 0), (0.17, 1), (0.5, 3), (0.9999, 5)):  # 6 starts
        batch = data.batch([0, 1], 5, torch.tensor([place, place]))
        assert batch.waveform.tolist() == [[start + i for i in range(5)], [0, 1, 2, 0, 0]]
        assert batch.lengths.tolist() == [5, 3]
    below_one = torch.tensor([1.0, 1.0], dtype=torch.float64).nextafter(torch.zeros(2).double())
    assert data.batch([0, 1], 5, below_one).waveform[0, 0] == 5
    for wrong in (torch.tensor([0.5]), torch.tensor([1.0, 0.5]), torch.tensor([0.5, -0.1])):
        with pytest.raises(ValueError, match=r"places must be \[2\] numbers in \[0, 1\)"):
            data.batch([0, 1], 5, wrong)
    with pytest.raises(ValueError, match="samples must be at least 1, not 0"):
        data.batch([0], 0)


def forbid_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr(decoding, "load_audio", refuse)


def count_decoding(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the clips that are decoded from now on."""
    seen: list[str] = []

    def counted(clip: Clip, sample_rate: int, dtype: str) -> np.ndarray:
        seen.append(clip.name)
        return whole(clip, sample_rate, dtype)

    whole = decoding.decode
    monkeypatch.setattr(decoding, "decode", counted)
    return seen


def test_the_disk_cache_is_found_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = waves(load(folder, "disk"))
    assert set(cached(folder)) == {"samples", "jsonl", "lock"}
    assert cached(folder)["samples"].stat().st_size == 4 * sum(map(len, before))
    index = [json.loads(line) for line in cached(folder)["jsonl"].read_text().splitlines()]
    assert index[0] == {"format": 1, "sample_rate": RATE, "dtype": "float32", "clips": COUNT}
    assert index[3] == {"name": "02.wav", "offset": 800 + 837, "length": 874}
    forbid_decoding(monkeypatch)
    for ours, expected in zip(waves(load(folder, "disk")), before, strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_a_changed_file_is_decoded_again(folder: Path) -> None:
    load(folder, "disk")
    time.sleep(0.01)
    soundfile.write(folder / "05.wav", -noise(5), RATE)
    np.testing.assert_array_equal(load(folder, "disk").waveforms[5], -noise(5))
    load(folder, "disk", cache_dtype="float16")
    load(folder, "disk", sample_rate=8000)
    assert len(list((folder.parent / "cache").glob("*.jsonl"))) == 4


@pytest.mark.parametrize(
    "torn", [b"", b'{"name": "0', b'{"name": "06.wav", "offset": 0, "length": 3}\n']
)
def test_a_killed_build_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch, torn: bytes) -> None:
    """Killed after eight clips, of which groups of three are committed."""
    monkeypatch.setattr(cache, "COMMIT_CLIPS", 3)
    write = cache._write

    def kill(file: Any, content: bytes) -> None:
        if file.name.endswith("samples.part") and content == noise(8).tobytes():
            write(file, content[: len(content) // 2])
            raise KeyboardInterrupt
        write(file, content)

    monkeypatch.setattr(cache, "_write", kill)
    with pytest.raises(KeyboardInterrupt):
        load(folder, "disk")
    assert set(cached(folder)) == {"samples.part", "jsonl.part", "lock"}
    monkeypatch.setattr(cache, "_write", write)
    with cached(folder)["jsonl.part"].open("ab") as file:
        file.write(torn)
    seen = count_decoding(monkeypatch)
    data = load(folder, "disk")
    # The first line is the head, so after three lines two clips are in it, then three more each.
    assert sorted(seen) == [f"{i:02}.wav" for i in range(8, COUNT)]
    for i, wave in enumerate(waves(data)):
        np.testing.assert_array_equal(wave, noise(i))
    assert set(cached(folder)) == {"samples", "jsonl", "lock"}


def test_a_full_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "COMMIT_CLIPS", 2)
    write = cache._write
    room = [6000]

    def full(file: Any, content: bytes) -> None:
        if len(content) > room[0]:
            write(file, content[: room[0]])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        room[0] -= len(content)
        write(file, content)

    monkeypatch.setattr(cache, "_write", full)
    with pytest.raises(OSError, match=r"cache .*No space left.*1 of 12 clips.*cache_dir") as error:
        load(folder, "disk")
    assert error.value.errno == errno.ENOSPC
    monkeypatch.setattr(cache, "_write", write)
    seen = count_decoding(monkeypatch)
    np.testing.assert_array_equal(load(folder, "disk").waveforms[11], noise(11))
    assert "00.wav" not in seen


def test_a_damaged_cache_is_mended(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(folder, "disk")
    samples = cached(folder)["samples"]
    os.truncate(samples, 4 * (800 + 837 + 10))
    seen = count_decoding(monkeypatch)
    for i, wave in enumerate(waves(load(folder, "disk"))):
        np.testing.assert_array_equal(wave, noise(i))
    assert sorted(seen) == [f"{i:02}.wav" for i in range(2, COUNT)]


def test_killed_between_the_two_renames(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(folder, "disk")
    index = cached(folder)["jsonl"]
    index.rename(index.with_name(index.name + ".part"))
    forbid_decoding(monkeypatch)
    np.testing.assert_array_equal(load(folder, "disk").waveforms[11], noise(11))


def test_processes_wait_for_the_one_that_builds(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two threads open the lock's file each, as two processes do."""
    seen = count_decoding(monkeypatch)
    found: list[AudioDataset] = []
    threads = [
        threading.Thread(target=lambda: found.append(load(folder, "disk"))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == COUNT
    assert [waves(data)[7].tolist() for data in found] == [noise(7).tolist()] * 3


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_bad_clips_are_left_out_now(folder: Path, kind: str) -> None:
    spoil(folder, 4, 11)
    for _ in range(2):  # also of a cache that is complete
        with pytest.warns(UserWarning, match="2 of 12 clips") as record:
            data = load(folder, kind)
        assert "04.wav" in str(record[0].message)
        assert len(data) == 10
        assert len(data.bad) == 2
        np.testing.assert_array_equal(data.waveforms[4], noise(5))
        assert data.targets.tolist() == [0, 1, 2, 0, 2, 0, 1, 2, 0, 1]
    spoil(folder, *range(COUNT))
    with pytest.raises(ValueError, match=r"none of the 12 clips .*00\.wav"):
        load(folder, kind)


def test_bad_clips_are_replaced_later(folder: Path) -> None:
    spoil(folder, 4, 5, 11)
    data = load(folder, "none")
    assert len(data) == COUNT
    assert data.bad == ()
    for repeat in range(2):
        with warnings.catch_warnings(record=True) as record:
            warnings.simplefilter("always")
            batch = data.batch([3, 4, 11, 5], 2000)
        named = [str(w.message).partition(".wav")[0][-2:] for w in record]
        assert named == ([] if repeat else ["04", "05", "11"])
        assert batch.target.tolist() == [0, 0, 0, 0]  # of clips 3, 6, 0 and 6
        assert batch.lengths.tolist() == [800 + 37 * i for i in (3, 6, 0, 6)]
        np.testing.assert_array_equal(batch.waveform[1, :1022], noise(6))
    assert len(data.bad) == 3
    # A resumed run, which meets only one of them, sees the same.
    with pytest.warns(UserWarning, match=r"05\.wav.*the next clip replaces it"):
        again = load(folder, "none").batch([5], 2000)
    assert torch.equal(again.waveform[0], batch.waveform[3])
    spoil(folder, *range(COUNT))
    with (
        pytest.warns(UserWarning, match="the next clip replaces it"),
        pytest.raises(ValueError, match="none of the 12 clips can be read"),
    ):
        load(folder, "none").batch([0], 2000)


def test_a_cache_cut_off_under_a_run(folder: Path) -> None:
    data = load(folder, "disk")
    os.truncate(cached(folder)["samples"], 4 * sum(len(noise(i)) for i in range(10)) + 8)
    assert data.batch([9], 2000).lengths.tolist() == [len(noise(9))]
    with pytest.warns(UserWarning, match=r"11\.wav: its part of the cache is missing"):
        batch = data.batch([11], 2000)
    np.testing.assert_array_equal(batch.waveform[0, :800], noise(0))
    assert len(data.bad) == 1


def test_prefetching_changes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(folder, 6)
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(3)).tolist()
    order += order[:4]  # asked for twice

    def batches(ahead: int, most: int) -> list[torch.Tensor]:
        monkeypatch.setattr(decoding, "MOST_WAITING_BYTES", most)
        data = load(folder, "none")
        found = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for start in range(0, len(order), 2):
                data.prefetch(torch.tensor(order[start : start + 2 * ahead]))
                found.extend(data.batch(order[start : start + 2], 1300))
        return found

    expected = batches(0, 1 << 20)
    for ahead, most in ((1, 1 << 20), (3, 1 << 20), (8, 5000), (8, 0)):
        found = batches(ahead, most)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_prefetching_is_ahead_and_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "MOST_WAITING_BYTES", 4 * 2000)
    seen = count_decoding(monkeypatch)
    source = decoding.OnDemand(list_clips(folder).clips, RATE, "float32")
    source.prefetch(range(COUNT))

    def settle() -> list[int]:
        end = time.monotonic() + 10
        while source._running and time.monotonic() < end:
            time.sleep(0.001)
        return sorted(int(name[:2]) for name in seen)

    # Two clips are below the limit, a third is not; those that are being decoded come on top.
    first = settle()
    assert first == list(range(len(first)))
    assert 3 <= len(first) <= 3 + decoding.workers()
    for i in first:
        assert source[i].tolist() == noise(i).tolist()
    second = settle()
    assert second == list(range(len(second)))
    assert len(first) < len(second) < COUNT + 1
    assert all(source[i].tolist() == noise(i).tolist() for i in range(len(first), COUNT))
    assert sorted(seen) == [f"{i:02}.wav" for i in range(COUNT)]  # nothing twice
    assert source._bytes == source._running == 0


def test_lengths_are_read_from_headers(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rate, name in ((44100, "a.flac"), (8000, "b.ogg"), (22050, "c.wav")):
        soundfile.write(folder / name, np.zeros((5003, 2)), rate)
    with zipfile.ZipFile(folder / "more.zip", "w") as archive:
        archive.write(folder / "03.wav", "d.wav")
        archive.writestr("e.wav", b"no audio")
    with (folder / "list.csv").open("a") as file:
        file.write("".join(f"{name},0,train\n" for name in ("a.flac", "b.ogg", "c.wav")))
        file.write("d.wav,0,train\ne.wav,0,train\n")
    with pytest.warns(UserWarning, match=r"e\.wav"):
        decoded = load(folder, "memory").lengths.tolist()
    forbid_decoding(monkeypatch)
    data = load(folder, "none")
    assert data.lengths.tolist() == [*decoded, 0]
    assert decoded[-1] == 800 + 37 * 3


def test_pieces_of_a_recording(folder: Path) -> None:
    clips = list_clips(folder).clips
    whole = clips[11]

    def piece(name: str, start: float, end: float) -> Clip:
        return Clip(name, (0,), "train", whole.files, whole.name, (start, end))

    listing = Listing((piece("x", 0.01, 0.04), piece("y", 0.02, 0.06)), ("a",))
    for kind in ("memory", "none"):
        data = AudioDataset.load(listing, "train", cache=kind)
        assert data.lengths.tolist() == [480, 640]
        np.testing.assert_array_equal(data.waveforms[1], noise(11)[320:960])
    short = Listing((piece("x", 0.01, 0.02), piece("y", 0.02, 0.06)), ("a",))
    with pytest.warns(UserWarning, match="x: is 10 ms long, at least 25 are needed"):
        assert len(AudioDataset.load(short, "train")) == 1


def test_many_bad_clips_are_counted(folder: Path) -> None:
    spoil(folder, *range(11))
    with pytest.warns(UserWarning, match="and 1 more"):
        assert len(load(folder, "memory")) == 1


def test_bad_arguments(folder: Path) -> None:
    listing = list_clips(folder)
    with pytest.raises(ValueError, match="cache must be one of memory, disk, none, not 'ram'"):
        AudioDataset.load(listing, "train", cache="ram")
    with pytest.raises(ValueError, match="cache_dir must name a folder"):
        AudioDataset.load(listing, "train", cache="disk")
    data = load(folder, "none")
    with pytest.raises(IndexError):
        data.batch([COUNT], 10)
    with pytest.raises(AudioError, match="no such file"):
        clip = listing.clips[0]
        decoding.decode(Clip("gone.wav", clip.target, clip.split, clip.files), RATE, "float32")


def test_decoding_runs_ahead_but_not_far(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache on disk is for data that memory does not hold: few clips wait to be written."""
    monkeypatch.setattr(decoding, "workers", lambda: 1)
    seen = count_decoding(monkeypatch)
    results: Iterable[object] = decoding.decode_all(list_clips(folder).clips, RATE, "float32")
    iterator = iter(results)
    next(iterator)
    time.sleep(0.2)
    assert len(seen) <= 5
    assert len(list(iterator)) == COUNT - 1
