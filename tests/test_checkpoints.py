from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny_models import features, tiny_ast
from torch import Tensor

import fastast
from fastast.checkpoints import CheckpointError, adapt_position_embedding
from fastast.model import AST, ASTConfig

ROUND = {"num_mel_bins": 128, "target_length": 128}  # 12 x 12 patches, as in an original file


def original_state(model: AST, prefix: str = "module.") -> dict[str, Tensor]:
    """The state dict of ``model`` as the original AST saves it, DeiT's unused heads included."""
    out = {}
    for name, value in model.state_dict().items():
        if name.startswith("patch_embed"):
            name = name.replace("patch_embed", "v.patch_embed.proj")
        elif name.startswith("head.norm"):
            name = name.replace("head.norm", "mlp_head.0")
        elif name.startswith("head.linear"):
            name = name.replace("head.linear", "mlp_head.1")
        else:
            name = f"v.{name}"
        out[prefix + name] = value.clone()
    for head in ("head", "head_dist"):
        out[f"{prefix}v.{head}.weight"] = torch.randn(1000, model.config.embed_dim)
        out[f"{prefix}v.{head}.bias"] = torch.randn(1000)
    return out


# ------------------------------------------------------------------------------------ own format


def test_round_trip(tmp_path: Path):
    labels = ("dog", "cat", "rain", "sea", "öl")
    model, x = tiny_ast(labels=labels, mean=-6.8, dropout=0.1, mlp_ratio=2.5), features()
    fastast.patch(model, r=3).save_pretrained(tmp_path / "new" / "folder")
    fastast.unpatch(model)
    folder = tmp_path / "new" / "folder"
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    values = json.loads((folder / "config.json").read_text())
    assert (values["model_type"], values["format_version"]) == ("fastast", 1)
    assert values["labels"][4] == "öl"

    for path in (folder, str(folder), folder / "model.safetensors"):
        again = AST.from_pretrained(path)
        assert again.config == model.config
        assert again.tome is None
        assert not again.training
        assert torch.equal(again(x), model(x))
        assert all(p.requires_grad for p in again.parameters())
    again.save_pretrained(folder)  # over the old one
    assert torch.equal(AST.from_pretrained(folder)(x), model(x))


def test_dtype_is_what_is_asked_for(tmp_path: Path):
    model = tiny_ast()
    model.half().save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors")["norm.weight"].dtype == torch.float16
    assert {p.dtype for p in AST.from_pretrained(tmp_path).parameters()} == {torch.float32}
    low = AST.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
    with pytest.raises(TypeError, match=r"dtype must be a floating torch dtype, got torch\.int8"):
        AST.from_pretrained(tmp_path, dtype=torch.int8)


def test_another_number_of_classes_gets_a_new_head(tmp_path: Path, caplog):
    model, x = tiny_ast(labels=tuple("abcde")), features()
    model.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, "fastast"):
        again = AST.from_pretrained(tmp_path, num_classes=9)
    assert "new head with random weights, 9 classes" in caplog.text
    assert again.config.labels == ()
    assert again(x).shape == (2, 9)
    assert torch.equal(again.forward_features(x), model.forward_features(x))
    assert 0.01 < again.head.linear.weight.std() < 0.03
    caplog.clear()
    assert AST.from_pretrained(tmp_path, num_classes=5).config == model.config
    assert not caplog.text


def test_overrides(tmp_path: Path):
    tiny_ast().save_pretrained(tmp_path)
    assert AST.from_pretrained(tmp_path, dropout=0.3, std=2.0).config.dropout == 0.3
    with pytest.raises(TypeError, match="not a field of ASTConfig: dropuot"):
        AST.from_pretrained(tmp_path, dropuot=0.3)
    with pytest.raises(ValueError, match="target_length must be at least patch_size"):
        AST.from_pretrained(tmp_path, target_length=3)
    with pytest.raises(CheckpointError, match=r"missing blocks\.3\..* and 7 more"):
        AST.from_pretrained(tmp_path, depth=4)
    with pytest.raises(CheckpointError, match=r"wrong shape .* \[64\] for \[32\]"):
        AST.from_pretrained(tmp_path, embed_dim=32)


# --------------------------------------------------------------------------- position embeddings


def test_position_embeddings_are_cut_from_the_middle_or_interpolated():
    f, t, dim = 4, 9, 3
    position = torch.randn(1, 2 + f * t, dim)
    image = position[:, 2:].view(1, f, t, dim)

    same = adapt_position_embedding(position, (f, t), (f, t))
    assert torch.equal(same, position)

    shorter = adapt_position_embedding(position, (f, t), (2, 5))
    assert torch.equal(shorter[:, :2], position[:, :2])
    assert torch.equal(shorter[:, 2:].view(2, 5, dim), image[0, 1:3, 2:7])  # [4-2:4+3], [2-1:2+1]

    longer = adapt_position_embedding(position, (f, t), (6, 20))[:, 2:].view(1, 6, 20, dim)
    channels_first = image.permute(0, 3, 1, 2)
    wide = F.interpolate(channels_first, (f, 20), mode="bilinear", align_corners=False)
    tall = F.interpolate(wide, (6, 20), mode="bilinear", align_corners=False)
    torch.testing.assert_close(longer, tall.permute(0, 2, 3, 1))

    mixed = adapt_position_embedding(position.half(), (f, t), (6, 5))
    assert mixed.shape == (1, 2 + 30, dim)
    assert mixed.dtype == torch.float16


def test_loading_for_another_clip_length(tmp_path: Path):
    model = tiny_ast()
    model.save_pretrained(tmp_path)
    shorter = AST.from_pretrained(tmp_path, target_length=56)  # 5 columns of 9
    position = adapt_position_embedding(model.pos_embed, (4, 9), (4, 5))
    assert torch.equal(shorter.pos_embed, position)
    assert shorter(features(target_length=56)).shape == (2, 5)
    longer = AST.from_pretrained(tmp_path, target_length=200, num_mel_bins=64)
    assert longer.config.grid == (5, 19)
    assert longer(features(target_length=200, num_mel_bins=64)).shape == (2, 5)
    assert torch.equal(longer.pos_embed[:, :2], model.pos_embed[:, :2])
    same_grid = AST.from_pretrained(tmp_path, target_length=99)
    assert torch.equal(same_grid.pos_embed, model.pos_embed)


# ------------------------------------------------------------------------------ original AST .pth


@pytest.mark.parametrize("prefix", ["module.", ""], ids=["parallel", "single"])
def test_original_files(tmp_path: Path, prefix):
    model = tiny_ast(num_heads=1, mlp_ratio=2.0, **ROUND)
    x = features(**ROUND)
    torch.save(original_state(model, prefix), tmp_path / "audio.pth")
    again = AST.from_pretrained(tmp_path / "audio.pth")
    assert again.config == model.config
    assert torch.equal(again(x), model(x))


def test_original_files_adapt_and_take_hints(tmp_path: Path):
    path = tmp_path / "audio.pth"
    torch.save(original_state(tiny_ast(num_heads=2, **ROUND)), path)
    longer = AST.from_pretrained(path, num_heads=2, target_length=512, num_classes=50)
    assert longer.config == ASTConfig(
        num_classes=50, embed_dim=64, depth=3, num_heads=2, target_length=512
    )
    # 144 patches are not 5 rows, so 64 mel bins are what to adapt to, not what the file has.
    assert AST.from_pretrained(path, num_heads=2, num_mel_bins=64).config.grid == (5, 12)

    wide = tiny_ast(num_heads=1, frequency_stride=16, time_stride=12, **ROUND)  # 8 x 10
    torch.save(original_state(wide), path)
    with pytest.raises(CheckpointError, match=r"80 patches, which are no 12 rows .* give the"):
        AST.from_pretrained(path)
    again = AST.from_pretrained(path, frequency_stride=16, time_stride=12)
    assert again.config == wide.config
    assert torch.equal(again(features(**ROUND)), wide(features(**ROUND)))


@pytest.mark.parametrize(("t_dim", "frames"), [(101, 1024), (50, 512), (12, 128), (1, 16)])
def test_published_clip_lengths_are_read_from_the_number_of_patches(tmp_path, t_dim, frames):
    model = tiny_ast(depth=1, num_heads=1, num_mel_bins=128, target_length=frames)
    assert model.config.grid == (12, t_dim)
    torch.save(original_state(model), tmp_path / "audio.pth")
    assert AST.from_pretrained(tmp_path / "audio.pth").config == model.config


def test_original_file_without_a_head(tmp_path: Path):
    state = original_state(tiny_ast(num_heads=1, **ROUND))
    state = {name: value for name, value in state.items() if "mlp_head" not in name}
    torch.save(state, tmp_path / "audio.pth")
    with pytest.raises(CheckpointError, match="holds no classification head: give num_classes"):
        AST.from_pretrained(tmp_path / "audio.pth")
    assert AST.from_pretrained(tmp_path / "audio.pth", num_classes=1).config.num_classes == 1
    assert AST.from_pretrained(tmp_path / "audio.pth", num_classes=7).config.num_classes == 7


# -------------------------------------------------------------------------------------- bad input


class Code:
    """A pickle that leaves a mark when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, writer):
    path, mark = tmp_path / "evil.pth", tmp_path / "it-ran"
    if writer == "torch":
        torch.save({"module.v.cls_token": torch.zeros(1), "x": Code(mark)}, path)
    else:
        path.write_bytes(pickle.dumps(Code(mark)))
    with pytest.raises(CheckpointError, match=r"holds code .* it was refused and nothing in it"):
        AST.from_pretrained(path)
    shutil.copy(path, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text('{"model_type": "audio-spectrogram-transformer"}')
    with pytest.raises(CheckpointError, match="refused"):
        AST.from_pretrained(tmp_path)
    assert not mark.exists()


@pytest.mark.parametrize("keep", [0, 7, 100, -100])
def test_truncated_files(tmp_path: Path, keep):
    model = tiny_ast(num_heads=1, **ROUND)
    path = tmp_path / "audio.pth"
    torch.save(original_state(model), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"audio\.pth is truncated or no checkpoint"):
        AST.from_pretrained(path)

    model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="is truncated or no safetensors file"):
        AST.from_pretrained(tmp_path)


def test_files_of_other_things(tmp_path: Path):
    path = tmp_path / "other.pth"
    path.write_text("this is text, not a checkpoint")
    with pytest.raises(CheckpointError, match="truncated or no checkpoint"):
        AST.from_pretrained(path)
    torch.save([torch.zeros(2)], path)
    with pytest.raises(CheckpointError, match="must hold a state dict"):
        AST.from_pretrained(path)
    torch.save({"epoch": 3, "model": {}}, path)
    with pytest.raises(CheckpointError, match="must hold a state dict"):
        AST.from_pretrained(path)
    torch.save(torch.nn.Linear(2, 2).state_dict(), path)
    with pytest.raises(CheckpointError, match=r"is not an AST: no pos_embed.*holds weight, bias"):
        AST.from_pretrained(path)
    torch.save({}, path)
    with pytest.raises(CheckpointError, match="it holds nothing"):
        AST.from_pretrained(path)


def test_missing_unexpected_and_misshapen_weights_are_listed(tmp_path: Path):
    model = tiny_ast()
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["blocks.1.mlp.fc2.bias"]
    state["blocks.1.mlp.fc3.bias"] = torch.zeros(3)
    state["norm.weight"] = torch.zeros(9)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        AST.from_pretrained(tmp_path)
    for part in (
        "missing blocks.1.mlp.fc2.bias",
        "unexpected blocks.1.mlp.fc3.bias",
        "wrong shape norm.weight [9] for [64]",
    ):
        assert part in str(error.value)


def test_bad_folders(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        AST.from_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not readable JSON"):
        AST.from_pretrained(tmp_path)
    config.write_text("[1]")
    with pytest.raises(CheckpointError, match="must hold a JSON object, not a list"):
        AST.from_pretrained(tmp_path)
    config.write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match="is of a 'bert' model; expected 'fastast' or"):
        AST.from_pretrained(tmp_path)
    for kind in ("fastast", "audio-spectrogram-transformer"):
        config.write_text(json.dumps({"model_type": kind, "format_version": 1}))
        with pytest.raises(CheckpointError, match=r"holds no weights: expected model\.safetensors"):
            AST.from_pretrained(tmp_path)


def test_bad_configs_of_ours(tmp_path: Path):
    tiny_ast().save_pretrained(tmp_path)
    good = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"format_version": 2}, "format_version 2; this FastAST reads 1"),
        ({"colour": "red"}, "unknown fields: colour"),
        ({"depth": "3"}, "depth must be an int, got '3'"),
        ({"num_heads": 7}, "embed_dim must be a multiple of num_heads"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**good, **change}))
        with pytest.raises(CheckpointError, match=message):
            AST.from_pretrained(tmp_path)


def test_nothing_there(tmp_path: Path):
    for path in (tmp_path / "none", tmp_path / "none.safetensors", "no-such-file.pth", "a/b/c"):
        with pytest.raises(CheckpointError, match="does not exist: expected a folder, a file or"):
            AST.from_pretrained(path)


def test_hub_ids(tmp_path: Path, monkeypatch):
    import huggingface_hub

    model = tiny_ast()
    model.save_pretrained(tmp_path)
    asked = []

    def download(repo_id: str, allow_patterns: list[str]) -> str:
        asked.append((repo_id, *allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    again = AST.from_pretrained("someone/some-ast_10.10-0.4593")
    assert torch.equal(again.pos_embed, model.pos_embed)
    assert [a[0] for a in asked] == ["someone/some-ast_10.10-0.4593"]
    assert not any("bin" in pattern or pattern == "*" for pattern in asked[0][1:])

    def offline(repo_id: str, allow_patterns: list[str]) -> str:
        raise ConnectionError("no network\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(CheckpointError) as error:
        AST.from_pretrained("someone/some-ast")
    assert "'someone/some-ast' is no file or folder here" in str(error.value)
    assert "ConnectionError: no network" in str(error.value)
