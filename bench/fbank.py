"""Fbank against a loop over torchaudio's kaldi.fbank, 32 clips of ten seconds.

python bench/fbank.py [--threads 1] [--rounds 15]
"""

from __future__ import annotations

import argparse

import torch
from timing import conditions, interleaved, ratio, with_warm_allocator
from torchaudio.compliance import kaldi

from fastast.features import Fbank

CLIPS, SECONDS, RATE = 32, 10, 16000


def torchaudio_loop(waveforms: torch.Tensor) -> torch.Tensor:
    """One clip at a time, as AST's data loader does it."""
    clips = []
    for wave in waveforms:
        clips.append(
            kaldi.fbank(
                (wave - wave.mean())[None],
                htk_compat=True,
                sample_frequency=RATE,
                use_energy=False,
                window_type="hanning",
                num_mel_bins=128,
                dither=0.0,
                frame_shift=10,
            )
        )
    return torch.stack(clips)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    with_warm_allocator()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    waveforms = torch.randn(CLIPS, SECONDS * RATE).cumsum(-1).sin() * 0.3
    ours = Fbank(mean=None, std=None)
    with torch.inference_mode():
        theirs = torchaudio_loop(waveforms)
        difference = float((ours(waveforms)[:, : theirs.shape[1]] - theirs).abs().max())
        assert difference < 1e-4, f"differs from torchaudio by {difference} of a log unit"
        times = interleaved(
            {"torchaudio": lambda: torchaudio_loop(waveforms), "fbank": lambda: ours(waveforms)},
            options.rounds,
            warm_up=2,
        )
    middle, low, high = ratio(times["torchaudio"], times["fbank"])
    print(f"log-mel of {CLIPS} clips of {SECONDS} s; {conditions()}")
    print(f"largest difference from torchaudio {difference:.2g} of a log unit")
    print(
        f"torchaudio loop {min(times['torchaudio']):.1f} ms  Fbank {min(times['fbank']):.1f} ms"
        f"  {middle:.2f}x  [{low:.2f}, {high:.2f}]"
    )


if __name__ == "__main__":
    main()
