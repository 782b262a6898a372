"""The checkpoint formats FastAST reads: its own, original AST files, Hugging Face AST folders.

Each is read into the same two things: an ``ASTConfig`` that describes the weights, and a state
dict with this package's names. Pickles are only ever read with ``weights_only=True``: nothing in a
file can run.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastast.config import ASTConfig

MODEL_TYPE = "fastast"
FORMAT_VERSION = 1
WEIGHTS, CONFIG = "model.safetensors", "config.json"
HEAD_DIM = 64  # of every published AST: the number of heads cannot be read from weights

State = dict[str, Tensor]


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or is not of an AST; the message says what was wrong."""


# ------------------------------------------------------------------------------------- names

# Original AST (facts: keys `v.*` and `mlp_head.*`, often under `module.` of DataParallel).
ORIGINAL_NAMES = [
    (r"v\.patch_embed\.proj\.(.+)", r"patch_embed.\1"),
    (r"v\.((?:cls_token|dist_token|pos_embed|blocks\.|norm\.).*)", r"\1"),
    (r"mlp_head\.0\.(.+)", r"head.norm.\1"),
    (r"mlp_head\.1\.(.+)", r"head.linear.\1"),
]
ORIGINAL_UNUSED = r"v\.head(_dist)?\..+"  # DeiT's own heads, saved but never read by AST

# Hugging Face, both spellings: up to transformers 5.6 `encoder.layer.i`, from 5.10 `layers.i`.
_LAYER = r"(?:encoder\.layer|layers)\.(\d+)\."
HUGGINGFACE_NAMES = [
    (r"embeddings\.cls_token", "cls_token"),
    (r"embeddings\.distillation_token", "dist_token"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection\.(.+)", r"patch_embed.\1"),
    (_LAYER + r"layernorm_before\.(.+)", r"blocks.\1.norm1.\2"),
    (_LAYER + r"layernorm_after\.(.+)", r"blocks.\1.norm2.\2"),
    (_LAYER + r"attention\.(?:attention\.query|q_proj)\.(.+)", r"blocks.\1.attn.q.\2"),
    (_LAYER + r"attention\.(?:attention\.key|k_proj)\.(.+)", r"blocks.\1.attn.k.\2"),
    (_LAYER + r"attention\.(?:attention\.value|v_proj)\.(.+)", r"blocks.\1.attn.v.\2"),
    (_LAYER + r"attention\.(?:output\.dense|o_proj)\.(.+)", r"blocks.\1.attn.proj.\2"),
    (_LAYER + r"(?:intermediate\.dense|mlp\.fc1)\.(.+)", r"blocks.\1.mlp.fc1.\2"),
    (_LAYER + r"(?:output\.dense|mlp\.fc2)\.(.+)", r"blocks.\1.mlp.fc2.\2"),
    (r"layernorm\.(.+)", r"norm.\1"),
    (r"classifier\.layernorm\.(.+)", r"head.norm.\1"),
    (r"classifier\.dense\.(.+)", r"head.linear.\1"),
]


def _renamed(state: State, names: list[tuple[str, str]], prefix: str) -> State:
    """``state`` with ``prefix`` cut off and the first matching rule of ``names`` applied."""
    out = {}
    for key, value in state.items():
        name = key.removeprefix(prefix)
        for pattern, replacement in names:
            if match := re.fullmatch(pattern, name):
                name = match.expand(replacement)
                break
        out[name] = value
    return out


def _joined_qkv(state: State) -> State:
    """Stack separate query, key and value projections, in this order, into one."""
    out = dict(state)
    for name in [name for name in state if name.endswith(".attn.q.weight")]:
        stem = name.removesuffix("q.weight")
        if not all(f"{stem}{part}.weight" in state for part in "qkv"):
            continue  # reported as missing
        out[f"{stem}qkv.weight"] = torch.cat([out.pop(f"{stem}{part}.weight") for part in "qkv"])
        if all(f"{stem}{part}.bias" in state for part in "qkv"):
            out[f"{stem}qkv.bias"] = torch.cat([out.pop(f"{stem}{part}.bias") for part in "qkv"])
    return out


# ------------------------------------------------------------------------------------- reading


def read_json(path: Path) -> dict[str, Any]:
    """The object of a JSON file, or a CheckpointError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def read_weights(path: Path) -> State:
    """The tensors of one file: safetensors by its name, anything else by ``torch.load``."""
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} is truncated or no safetensors file: {error}") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of pickles it is about to refuse
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f" ({found.group(1)})" if found else ""
        raise CheckpointError(
            f"{path} is a pickle that holds code or objects other than tensors{what}; "
            "it was refused and nothing in it was run"
        ) from None  # the original message recommends switching the protection off
    except Exception as error:  # a damaged file surfaces as almost any exception
        raise CheckpointError(
            f"{path} is truncated or no checkpoint: {type(error).__name__} {error}"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(f"{path} must hold a state dict, tensors by name, and nothing else")
    return state


def read_folder_weights(folder: Path) -> State:
    """The tensors of a folder: one file or shards, safetensors before pickles."""
    for name in (WEIGHTS, "pytorch_model.bin"):
        if (folder / name).is_file():
            return read_weights(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = set(read_json(index).get("weight_map", {}).values())
            state: State = {}
            for shard in sorted(shards):
                if Path(shard).name != shard or not (folder / shard).is_file():
                    raise CheckpointError(f"{index} names {shard!r}, which is not in the folder")
                state.update(read_weights(folder / shard))
            return state
    raise CheckpointError(
        f"{folder} holds no weights: expected {WEIGHTS}, pytorch_model.bin or their .index.json"
    )


def _own_config(values: dict[str, Any], path: Path) -> ASTConfig:
    version = values.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format_version {version!r}; this FastAST reads {FORMAT_VERSION}"
        )
    known = {f.name for f in fields(ASTConfig)}
    unknown = set(values) - known - {"model_type", "format_version"}
    if unknown:
        raise CheckpointError(f"{path} has unknown fields: {', '.join(sorted(unknown))}")
    try:
        return ASTConfig(**{name: value for name, value in values.items() if name in known})
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _huggingface_config(values: dict[str, Any], folder: Path, state: State) -> ASTConfig:
    """``ASTConfig`` of a Hugging Face folder; what its config.json leaves out are its defaults."""
    activation = values.get("hidden_act", "gelu")
    if activation != "gelu":
        raise CheckpointError(f"{folder}: hidden_act must be 'gelu', got {activation!r}")
    patch = values.get("patch_size", 16)
    if isinstance(patch, list):
        patch = patch[0] if len(set(patch)) == 1 else patch
    width = values.get("hidden_size", 768)
    eps = values.get("layer_norm_eps", 1e-12)
    head = state.get("head.linear.weight")
    names = values.get("id2label") or {}
    num_classes = len(names) or 2 if head is None else head.shape[0]
    labels = tuple(str(names[key]) for key in sorted(names, key=int))
    if len(labels) != num_classes or all(re.fullmatch(r"LABEL_\d+", name) for name in labels):
        labels = ()

    features: dict[str, Any] = {}
    if (folder / "preprocessor_config.json").is_file():
        extractor = read_json(folder / "preprocessor_config.json")
        features["sample_rate"] = extractor.get("sampling_rate", 16000)
        if extractor.get("do_normalize", True):
            features.update({k: extractor[k] for k in ("mean", "std") if k in extractor})
        else:
            features.update(mean=0.0, std=0.5)  # (x - 0) / (2 * 0.5): left as it is
    try:
        return ASTConfig(
            num_classes=num_classes,
            embed_dim=width,
            depth=values.get("num_hidden_layers", 12),
            num_heads=values.get("num_attention_heads", 12),
            mlp_ratio=values.get("intermediate_size", 3072) / width,
            patch_size=patch,
            frequency_stride=values.get("frequency_stride", 10),
            time_stride=values.get("time_stride", 10),
            num_mel_bins=values.get("num_mel_bins", 128),
            target_length=values.get("max_length", 1024),
            layer_norm_eps=eps,
            head_layer_norm_eps=eps,
            dropout=float(values.get("hidden_dropout_prob", 0.0)),
            labels=labels,
            **features,
        )
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from error


def _read_folder(folder: Path, weights: Path | None = None) -> tuple[ASTConfig, State]:
    """Config and weights of a folder of ours or of Hugging Face's."""
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} has no {CONFIG}, which says what the weights are")
    values = read_json(folder / CONFIG)
    kind = values.get("model_type")
    if kind not in (MODEL_TYPE, "audio-spectrogram-transformer"):
        raise CheckpointError(
            f"{folder / CONFIG} is of a {kind!r} model; expected {MODEL_TYPE!r} or "
            "'audio-spectrogram-transformer'"
        )
    state = read_folder_weights(folder) if weights is None else read_weights(weights)
    if kind == MODEL_TYPE:
        return _own_config(values, folder / CONFIG), state
    state = _renamed(state, HUGGINGFACE_NAMES, "audio_spectrogram_transformer.")
    state = _joined_qkv(state)
    if values.get("qkv_bias") is False:
        for name in [n for n in state if n.endswith("qkv.weight")]:
            bias = name.replace("weight", "bias")
            state.setdefault(bias, state[name].new_zeros(state[name].shape[0]))
    return _huggingface_config(values, folder, state), state


def _frames(t_dim: int, time_stride: int, patch_size: int) -> int:
    """Frames that ``t_dim`` patches were most likely cut from: the roundest number in binary.

    101 patches at the published stride could be 1016 to 1025 frames: 1024.
    """
    least = (t_dim - 1) * time_stride + patch_size
    return max(range(least, least + time_stride), key=lambda frames: frames & -frames)


def _original_config(state: State, path: Path, asked: dict[str, Any]) -> ASTConfig:
    """``ASTConfig`` of an original AST: from shapes, from what is asked for, or the usual."""
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    needed = ("pos_embed", "patch_embed.weight", "blocks.0.mlp.fc1.weight")
    absent = [name for name in needed if name not in shapes]
    if absent:
        found = ", ".join(list(shapes)[:3]) or "nothing"
        raise CheckpointError(
            f"{path} is not an AST: no {', '.join(absent)} (it holds {found}, ...)"
        )
    if len(shapes["pos_embed"]) != 3 or len(shapes["patch_embed.weight"]) != 4:
        raise CheckpointError(f"{path} is not an AST: pos_embed is {list(shapes['pos_embed'])}")
    _, tokens, width = shapes["pos_embed"]
    patch, patches = shapes["patch_embed.weight"][-1], tokens - 2
    depth = 1 + max(int(m.group(1)) for name in shapes if (m := re.match(r"blocks\.(\d+)\.", name)))
    heads = asked.get("num_heads") or (width // HEAD_DIM if width % HEAD_DIM == 0 else None)
    if heads is None:
        raise CheckpointError(f"{path} is {width} wide: give num_heads, weights do not tell it")

    f_stride, t_stride = asked.get("frequency_stride", 10), asked.get("time_stride", 10)
    # Mel bins that are asked for describe the file if they can, else what to adapt it to.
    for mel_bins in (asked.get("num_mel_bins", 128), 128):
        f_dim = (mel_bins - patch) // f_stride + 1
        if f_dim > 0 and patches > 0 and patches % f_dim == 0:
            break
    else:
        raise CheckpointError(
            f"{path} has {patches} patches, which are no {f_dim} rows of frequency: give the "
            f"file's frequency_stride and time_stride (tried {f_stride} and {t_stride}) "
            "or num_mel_bins"
        )
    head = shapes.get("head.linear.weight")
    try:
        return ASTConfig(
            num_classes=asked.get("num_classes") or 1 if head is None else head[0],
            embed_dim=width,
            depth=depth,
            num_heads=heads,
            mlp_ratio=shapes["blocks.0.mlp.fc1.weight"][0] / width,
            patch_size=patch,
            frequency_stride=f_stride,
            time_stride=t_stride,
            num_mel_bins=mel_bins,
            target_length=_frames(patches // f_dim, t_stride, patch),
        )
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _read_original(path: Path, asked: dict[str, Any]) -> tuple[ASTConfig, State]:
    """Config and weights of an original AST ``.pth``, saved from DataParallel or not."""
    state = {name.removeprefix("module."): value for name, value in read_weights(path).items()}
    state = {name: v for name, v in state.items() if not re.fullmatch(ORIGINAL_UNUSED, name)}
    state = _renamed(state, ORIGINAL_NAMES, "")
    return _original_config(state, path, asked), state


def _download(hub_id: str) -> Path:
    """Folder of a Hugging Face model: its configs, and its weights in one format."""
    from huggingface_hub import snapshot_download

    try:
        for weights in ("model*.safetensors", "pytorch_model*.bin"):
            patterns = [weights, "config.json", "preprocessor_config.json", "*.index.json"]
            folder = Path(snapshot_download(hub_id, allow_patterns=patterns))
            if any(folder.glob(weights)):
                break
    except Exception as error:  # no network, no such id, gated, full disk: all say what happened
        raise CheckpointError(
            f"{hub_id!r} is no file or folder here, and the Hugging Face hub did not give it: "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        ) from error
    return folder


def read_checkpoint(path: str | os.PathLike[str], asked: dict[str, Any]) -> tuple[ASTConfig, State]:
    """Config and weights, under this package's names, of whatever is at ``path``.

    Args:
        path: a folder, a file or a Hugging Face hub id.
        asked: fields of the config that the user gave: they tell what an original file does not.

    Raises:
        CheckpointError: nothing is there, it cannot be read, or it is not of an AST.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        return _read_folder(place)
    if place.is_file():
        if place.suffix == ".safetensors":
            return _read_folder(place.parent, weights=place)
        return _read_original(place, asked)
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(path)) and place.suffix not in (".pth", ".pt"):
        return _read_folder(_download(str(path)))
    raise CheckpointError(f"{path} does not exist: expected a folder, a file or a hub id")
