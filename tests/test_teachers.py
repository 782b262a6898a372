"""Teacher networks: EfficientAT's against its table, PSLA's head by hand, weights in and out."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import fastast
from fastast.formats import CheckpointError
from fastast.teachers import Network, NetworkConfig, build, front_end_of, load
from fastast.teachers.mel32k import Mel32k
from fastast.teachers.timm_network import PSLAHead

MN04 = Path(__file__).parents[2] / "shared/data/teacher_mn04/mn04_as_mAP_432.safetensors"

# mn04 as its README has it: in, expanded, out, kernel, stride, hardswish, width of the gate.
TABLE = [
    (8, 8, 8, 3, 1, False, 0),
    (8, 24, 16, 3, 2, False, 0),
    (16, 32, 16, 3, 1, False, 0),
    (16, 32, 16, 5, 2, False, 8),
    (16, 48, 16, 5, 1, False, 16),
    (16, 48, 16, 5, 1, False, 16),
    (16, 96, 32, 3, 2, True, 0),
    (32, 80, 32, 3, 1, True, 0),
    (32, 72, 32, 3, 1, True, 0),
    (32, 72, 32, 3, 1, True, 0),
    (32, 192, 48, 3, 1, True, 48),
    (48, 272, 48, 3, 1, True, 72),
    (48, 272, 64, 5, 2, True, 72),
    (64, 384, 64, 5, 1, True, 96),
    (64, 384, 64, 5, 1, True, 96),
]


def randomised(network: Network) -> Network:
    """No statistic of a BatchNorm at its initial value, where it could be mistaken for another."""
    for name, value in network.state_dict().items():
        if name.endswith(("running_mean", "bias")):
            value.normal_(0, 0.1)
        elif name.endswith("running_var"):
            value.uniform_(0.5, 1.5)
    return network.eval()


def by_table(state: dict[str, Tensor], features: Tensor) -> tuple[Tensor, Tensor]:
    """mn04's embedding and logits, written from the table."""

    def layer(x: Tensor, name: str, k: int, stride: int, groups: int, act: Any) -> Tensor:
        x = F.conv2d(x, state[f"{name}.0.weight"], None, stride, (k - 1) // 2, 1, groups)
        norm = (state[f"{name}.1.{n}"] for n in ("running_mean", "running_var", "weight", "bias"))
        x = F.batch_norm(x, *norm, eps=1e-3)
        return act(x)

    def dense(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    x = layer(features.transpose(1, 2)[:, None], "features.0", 3, 2, 1, F.hardswish)
    for i, (channels, expanded, out, k, stride, hard, gate) in enumerate(TABLE, start=1):
        act = F.hardswish if hard else F.relu
        y, part = x, 0
        if expanded != channels:
            y, part = layer(y, f"features.{i}.block.0", 1, 1, 1, act), 1
        y = layer(y, f"features.{i}.block.{part}", k, stride, expanded, act)
        if gate:
            part += 1
            name = f"features.{i}.block.{part}.conc_se_layers.0"
            assert state[f"{name}.fc1.weight"].shape == (gate, expanded)
            scale = dense(F.relu(dense(y.mean((2, 3)), f"{name}.fc1")), f"{name}.fc2").sigmoid()
            y = y * scale[:, :, None, None]
        y = layer(y, f"features.{i}.block.{part + 1}", 1, 1, 1, lambda z: z)
        assert y.shape[1] == out
        x = x + y if stride == 1 and channels == out else y
    embedding = layer(x, "features.16", 1, 1, 1, F.hardswish).mean((2, 3))
    return embedding, dense(F.hardswish(dense(embedding, "classifier.2")), "classifier.5")


def test_mn04_is_its_table() -> None:
    network = randomised(build("mn04", 527, target_length=40))
    assert sum(p.numel() for p in network.parameters()) == 983_599  # the published file's
    features = torch.randn(2, 40, 128)
    embedding, logits = by_table(network.state_dict(), features)
    with torch.no_grad():
        torch.testing.assert_close(network.embed(features), embedding)
        torch.testing.assert_close(network(features), logits)
    assert embedding.shape == (2, network.embedding_dim) == (2, 384)
    network.train()
    assert not torch.equal(network(features), network(features))  # dropout before the last layer


@pytest.mark.skipif(not MN04.is_file(), reason="the published weights are not beside the project")
def test_the_published_mn04_loads() -> None:
    network = build("mn04", 527, weights=MN04)
    stored = load_file(MN04)
    state = network.state_dict()
    assert stored.keys() == {name for name in state if not name.endswith("num_batches_tracked")}
    assert all(torch.equal(state[name], value) for name, value in stored.items())
    features = front_end_of(network)(torch.zeros(1, 32000))
    probability = network(features).sigmoid()[0]
    assert probability.argmax() == 500  # AudioSet's class "Silence"


def test_other_widths() -> None:
    mn10 = build("mn10", 527)
    assert mn10.embedding_dim == 960
    millions = sum(p.numel() for p in mn10.parameters()) / 1e6
    assert round(millions, 2) == 4.88  # as published
    assert [p.shape[0] for n, p in mn10.named_parameters() if n.startswith("classifier")] == [
        1280, 1280, 527, 527,
    ]  # fmt: skip


# --------------------------------------------------------------------------------------- heads


def test_psla_head_by_hand() -> None:
    """Two channels, two moments; attention and classes are 0.5 but where a weight says else."""
    head = PSLAHead(2, 1)
    with torch.no_grad():
        for p in head.parameters():
            p.zero_()
        head.head_weight.copy_(torch.tensor([0.25, 0.25, 0.25, 0.25]))
        head.att[0].weight.copy_(torch.tensor([1.0, 0.0]).view(1, 2, 1, 1))
        head.cla[0].weight.copy_(torch.tensor([0.0, 1.0]).view(1, 2, 1, 1))
        head.cla[1].bias.fill_(2.0)
    # Frequency is averaged first: moments (1, -1) and (0, 3).
    feature_map = torch.tensor([[[[0.0, 1.0], [2.0, -1.0]], [[-3.0, 3.0], [1.0, 3.0]]]])

    def sigmoid(x: float) -> float:
        return float(torch.tensor(x, dtype=torch.float64).sigmoid())

    a, b = sigmoid(1.0), 0.5
    first = (a * sigmoid(-1.0) + b * sigmoid(3.0)) / (a + b)
    expected = 0.25 * (first + sigmoid(2.0) + 0.5 + 0.5)
    got = head(feature_map).sigmoid()
    assert got.shape == (1, 1)
    assert float(got.detach()) == pytest.approx(expected, rel=1e-6)


def test_psla_probabilities_are_clamped() -> None:
    head = PSLAHead(1, 2)
    with torch.no_grad():
        for p in head.parameters():
            p.zero_()
        head.head_weight.fill_(0.6)  # 4 * 0.6 * 0.5 > 1
        head.cla[0].bias.copy_(torch.tensor([0.0, 0.0]))
    logits = head(torch.randn(1, 1, 2, 3))
    assert torch.isfinite(logits).all()
    torch.testing.assert_close(logits.sigmoid(), torch.ones(1, 2), rtol=0, atol=2e-7)
    with torch.no_grad():
        head.head_weight.fill_(-1.0)
    torch.testing.assert_close(
        head(torch.randn(1, 1, 2, 3)), torch.full((1, 2), -16.118095), rtol=1e-5, atol=0
    )
    assert head.bfloat16()(torch.randn(1, 1, 2, 3).bfloat16()).dtype == torch.float32


def test_a_linear_head_replaces_any() -> None:
    weight, bias = torch.randn(3, 384), torch.randn(3)
    network = randomised(build("mn04", 5, labels=tuple("vwxyz"), target_length=32))
    features = torch.randn(2, 32, 128)
    network.set_linear_head(weight, bias, ("a", "b", "c"))
    assert (network.config.num_classes, network.config.labels) == (3, ("a", "b", "c"))
    assert network.config.head == "linear"
    with torch.no_grad():
        expected = network.embed(features) @ weight.t() + bias
        torch.testing.assert_close(network(features), expected)
    with pytest.raises(ValueError, match=r"weight must be \[classes, 384\]"):
        network.set_linear_head(torch.randn(3, 383), bias)
    with pytest.raises(ValueError, match=r"bias must be \[3\] as weight, got \[2\]"):
        network.set_linear_head(weight, torch.randn(2))
    with pytest.raises(ValueError, match="labels must be num_classes, 3"):
        network.set_linear_head(weight, bias, ("a", "b"))
    assert network.config.labels == ("a", "b", "c")


# ---------------------------------------------------------------------------------------- timm


def test_a_cnn_of_timm_is_mean_pooled() -> None:
    pytest.importorskip("timm", reason='timm (extra "timm") is not installed')
    network: Any = randomised(build("timm:resnet18", 4, target_length=70))
    features = torch.randn(2, 70, 128)
    with torch.no_grad():
        image = features.transpose(1, 2)[:, None]  # [B, 1, 128, 70]
        feature_map = network.backbone.forward_features(image)
        embedding = feature_map.mean((2, 3))
        torch.testing.assert_close(network.embed(features), embedding)
        torch.testing.assert_close(network(features), network.head(embedding))
    assert embedding.shape == (2, 512)
    assert feature_map.shape[2:] == (4, 3)
    front = front_end_of(network)
    assert (front.target_length, front.mean, front.std) == (70, -4.2677393, 4.5689974)


def test_psla_on_a_cnn() -> None:
    pytest.importorskip("timm", reason='timm (extra "timm") is not installed')
    network: Any = randomised(build("timm:resnet18_psla", 4, target_length=64))
    assert network.training is False
    features = torch.randn(2, 64, 128)
    with torch.no_grad():
        feature_map = network.backbone.forward_features(features.transpose(1, 2)[:, None])
        torch.testing.assert_close(network(features), network.head(feature_map))
        torch.testing.assert_close(network.embed(features), feature_map.mean((2, 3)))
        network.set_linear_head(torch.eye(512)[:3], torch.zeros(3))
        torch.testing.assert_close(network(features), feature_map.mean((2, 3))[:, :3])
    assert network.config.head == "mean"


def test_efficientnet_b2_has_pslas_normalisation() -> None:
    pytest.importorskip("timm", reason='timm (extra "timm") is not installed')
    network = build("efficientnet_b2", 527)
    assert network.config.target_length == 1056
    assert network.embedding_dim == 1408
    log_mel = torch.tensor([-4.6476, 0.0])
    expected = (log_mel + 4.6476) / 4.5699
    torch.testing.assert_close(front_end_of(network).normalize(log_mel), expected)


def test_a_vit_takes_the_size_of_the_features(tmp_path: Path) -> None:
    pytest.importorskip("timm", reason='timm (extra "timm") is not installed')
    network: Any = build("timm:vit_tiny_patch16_224", 3, target_length=48)
    assert network.backbone.pos_embed.shape[1] == 1 + 8 * 3
    features = torch.randn(2, 48, 128)
    network.save_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path)(features), network(features))
    with pytest.raises(CheckpointError, match=r"wrong shape backbone\.pos_embed \[1, 25, 192\]"):
        load(tmp_path, target_length=64)
    with pytest.raises(ValueError, match="cannot have the head 'psla'"):
        build("timm:vit_tiny_patch16_224_psla", 3, target_length=48)


def test_timms_own_weights_lose_their_colours(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    timm = pytest.importorskip("timm", reason='timm (extra "timm") is not installed')
    coloured = timm.create_model("resnet18")
    save_file(coloured.state_dict(), tmp_path / "resnet18.safetensors")
    weights = tmp_path / "resnet18.safetensors"
    network: Any = build("timm:resnet18", 4, target_length=64, weights=weights)
    expected = coloured.conv1.weight.mean(1, keepdim=True)
    torch.testing.assert_close(network.backbone.conv1.weight, expected)
    assert torch.equal(network.backbone.layer4[1].conv2.weight, coloured.layer4[1].conv2.weight)
    assert "new head with random weights, 4 classes" in caplog.text


def test_timm_is_asked_for_weights_only_if_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm", reason='timm (extra "timm") is not installed')
    create, asked = timm.create_model, []

    def offline(name: str, pretrained: bool, **options: Any) -> nn.Module:
        asked.append(pretrained)
        model = create(name, pretrained=False, **options)
        nn.init.constant_(model.conv1.weight, 3.0)  # what three colours of 1 are added up to
        return model

    monkeypatch.setattr(timm, "create_model", offline)
    network: Any = build("timm:resnet18", 4, target_length=64, weights="pretrained")
    assert (network.backbone.conv1.weight == 1.0).all()
    build("timm:resnet18", 4, target_length=64)
    assert asked[-1] is False
    assert asked[0] is True

    def broken(name: str, pretrained: bool, **options: Any) -> nn.Module:
        raise OSError("no network")

    monkeypatch.setattr(timm, "create_model", broken)
    with pytest.raises(CheckpointError, match="weights of 'resnet18': OSError: no network"):
        build("timm:resnet18", 4, target_length=64, weights="pretrained")


# --------------------------------------------------------------------------------------- PaSST


class StubPaSST(nn.Module):
    """What the wrapper uses of hear21passt's class, at a tenth of the size."""

    def __init__(self, n_classes: int, input_tdim: int) -> None:
        super().__init__()
        self.embed_dim = 8
        self.patch_embed = nn.Conv2d(1, 8, 16, 10)
        self.patch_embed.img_size = (128, input_tdim)  # type: ignore[assignment]
        self.time_new_pos_embed = nn.Parameter(torch.randn(1, 8, 1, 99))
        self.head = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, n_classes))
        self.head_dist: nn.Module | None = nn.Linear(8, n_classes)

    def forward_features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        assert tuple(x.shape[2:]) == self.patch_embed.img_size  # the real one warns
        x = self.patch_embed(x)
        x = x + self.time_new_pos_embed[..., : x.shape[-1]]
        return x.amax((2, 3)), x.mean((2, 3))


@pytest.fixture
def hear21passt(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A stub with hear21passt 0.0.26's API: the package itself is no dependency."""
    package, models = types.ModuleType("hear21passt"), types.ModuleType("hear21passt.models")
    passt: Any = types.ModuleType("hear21passt.models.passt")

    def get_model(
        arch: str = "passt_s_kd_p16_128_ap486", pretrained: bool = True, n_classes: int = 527,
        in_channels: int = 1, fstride: int = 10, tstride: int = 10, input_fdim: int = 128,
        input_tdim: int = 998,
    ) -> nn.Module:  # fmt: skip
        assert arch == "passt_s_swa_p16_128_ap476"
        assert not pretrained
        model = StubPaSST(n_classes, input_tdim)
        print(model)
        return model

    passt.get_model, passt.first_RUN = get_model, True
    models.passt = passt  # type: ignore[attr-defined]
    for module in (package, models, passt):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return passt


def test_passt(
    hear21passt: Any, tmp_path: Path, capsys: pytest.CaptureFixture, caplog: Any
) -> None:
    original = StubPaSST(527, 998)
    torch.save(original.state_dict(), tmp_path / "passt.pt")
    network = build("passt", 527, target_length=100, weights=tmp_path / "passt.pt")
    assert not caplog.text
    features = torch.randn(2, 100, 128)
    with torch.no_grad():
        original.patch_embed.img_size = (128, 100)  # type: ignore[assignment]
        cls, dist = original.forward_features(features.transpose(1, 2)[:, None])
        torch.testing.assert_close(network(features), original.head((cls + dist) / 2))
        torch.testing.assert_close(network.embed(features), original.head[0]((cls + dist) / 2))
    assert isinstance(front_end_of(network), Mel32k)
    assert hear21passt.first_RUN is False
    assert capsys.readouterr().out == ""

    network.set_linear_head(torch.randn(3, 8), torch.randn(3))
    network.save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path / "saved")(features), network(features))
    build("passt", 50, weights=tmp_path / "passt.pt")
    assert "new head with random weights, 50 classes" in caplog.text
    with pytest.raises(ValueError, match="target_length of 'passt' must be from 16 to 998, got 99"):
        build("passt", 3, target_length=999)


@pytest.mark.parametrize(
    ("arch", "missing", "message"),
    [
        ("passt", "hear21passt", "pip install hear21passt timm"),
        ("timm:resnet18", "timm", r'pip install "fastast\[timm\]"'),
    ],
)
def test_missing_packages(
    arch: str, missing: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=message):
        build(arch, 3)


def test_importing_is_cheap() -> None:
    code = (
        "import sys, fastast.teachers, fastast.probe, fastast.cli.teaching; "
        "print({'timm', 'hear21passt', 'sklearn', 'torchaudio', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# --------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("fitted", [False, True])
def test_saved_and_loaded(tmp_path: Path, fitted: bool) -> None:
    network = randomised(build("mn04", 3, ("a", "b", "c"), target_length=40, mean=-5.0, std=2.0))
    if fitted:
        network.set_linear_head(torch.randn(2, 384), torch.randn(2), ("x", "y"))
    network.save_pretrained(tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    values = json.loads((folder / "config.json").read_text())
    assert values["model_type"] == "fastast_network"
    assert (values["arch"], values["mean"], values["std"]) == ("mn04", -5.0, 2.0)
    for path in (folder, folder / "model.safetensors"):
        again = load(path)
        assert again.config == network.config
        assert not again.training
        features = torch.randn(2, 40, 128)
        assert torch.equal(again(features), network(features))
    longer = load(folder, target_length=64)
    assert longer.config.target_length == 64
    assert front_end_of(longer).target_length == 64
    assert front_end_of(longer).mean == -5.0
    assert longer(torch.randn(1, 64, 128)).shape == (1, 2 if fitted else 3)


def test_an_ast_is_loaded_too(tmp_path: Path) -> None:
    config = fastast.ASTConfig(
        num_classes=2, embed_dim=64, depth=1, num_heads=1, target_length=48, mean=-3.0
    )
    model = fastast.AST(config).eval()
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert isinstance(again, fastast.AST)
    features = torch.randn(1, 48, 128)
    assert torch.equal(again(features), model(features))
    front = front_end_of(again)
    assert isinstance(front, fastast.Fbank)
    assert (front.target_length, front.mean, front.n_mels) == (48, -3.0, 128)
    assert load(tmp_path, target_length=64).config.target_length == 64
    with pytest.raises(TypeError, match="model must be an AST or a teacher network, got Linear"):
        front_end_of(nn.Linear(2, 2))


def test_weights_of_another_kind(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = randomised(build("mn04", 527, target_length=32))
    state = {f"module.{name}": value for name, value in source.state_dict().items()}
    torch.save(state, tmp_path / "parallel.pt")
    features = torch.randn(1, 32, 128)
    same = build("mn04", 527, target_length=32, weights=tmp_path / "parallel.pt")
    assert torch.equal(same(features), source(features))
    assert not caplog.text
    with caplog.at_level(logging.WARNING):
        other = build("mn04", 50, target_length=32, weights=tmp_path / "parallel.pt")
    assert "parallel.pt: new head with random weights, 50 classes" in caplog.text
    assert torch.equal(other.embed(features), source.embed(features))
    assert torch.equal(other.classifier[2].weight, source.classifier[2].weight)  # type: ignore
    source.save_pretrained(tmp_path / "folder")
    assert torch.equal(
        build("mn04", 527, target_length=32, weights=tmp_path / "folder")(features),
        source(features),
    )


def test_unusable_weights(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"x": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match="refused and nothing in it was run"):
        build("mn04", 2, weights=tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()

    network = build("mn04", 2)
    network.save_pretrained(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-100])
    for attempt in (lambda: build("mn04", 2, weights=tmp_path), lambda: load(tmp_path)):
        with pytest.raises(CheckpointError, match="truncated or no safetensors"):
            attempt()
    torch.save({"fc.weight": torch.ones(2)}, tmp_path / "other.pt")
    with pytest.raises(
        CheckpointError,
        match=r"weights of 'mn04': missing .* and \d+ more; unexpected fc\.weight$",
    ):
        build("mn04", 2, weights=tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="does not exist"):
        build("mn04", 2, weights=tmp_path / "nothing.pt")
    with pytest.raises(CheckpointError, match="does not exist"):
        load(tmp_path / "nothing.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 9}, "format_version 9; this FastAST reads 1"),
        ({"colour": 1}, "unknown fields: colour"),
        ({"arch": "resnet"}, "arch must be mn04 .*got 'resnet'"),
        ({"arch": 3}, "arch must be a string"),
        ({"head": "psla"}, "head of 'mn04' must be one of linear, mlp, got 'psla'"),
        ({"labels": ["a"]}, "labels must be num_classes, 2, names or none, got 1"),
        ({"std": 0}, "std must be finite and more than 0, got 0"),
        ({"num_classes": 3}, r"wrong shape classifier\.5\.\w+ \[2"),
        ({"arch": "mn10"}, "does not hold the weights of 'mn10'"),
        ({"model_type": "bert"}, "is of a 'bert' model"),
    ],
)
def test_unusable_configs(tmp_path: Path, change: dict, message: str) -> None:
    build("mn04", 2).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)
    path.write_text("{")
    with pytest.raises(CheckpointError, match="not readable JSON"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"arch": "resnet18"}, ValueError, "arch must be mn04 .*timm:NAME_psla, got 'resnet18'"),
        ({"arch": "timm:no_such_net"}, ValueError, "is no model of timm"),
        ({"arch": "mn00"}, ValueError, "arch must be 'mn04', 'mn10' or alike"),
        ({"num_classes": 0}, ValueError, "num_classes must be 1 or more"),
        ({"num_classes": 2.0}, TypeError, "num_classes must be an int"),
        ({"target_length": True}, TypeError, "target_length must be an int"),
        ({"mean": "x"}, TypeError, "mean must be a number"),
        ({"mean": float("nan")}, ValueError, "mean must be finite"),
        ({"labels": (1, 2)}, TypeError, "labels must be strings"),
        ({"weights": "pretrained"}, ValueError, "weights must be a file or folder for 'mn04'"),
    ],
)
def test_bad_arguments(arguments: dict, error: type, message: str) -> None:
    if "timm" in str(arguments.get("arch")):
        pytest.importorskip("timm", reason='timm (extra "timm") is not installed')
    with pytest.raises(error, match=message):
        build(**{"arch": "mn04", "num_classes": 2, **arguments})


def test_bad_features_and_configs() -> None:
    network = build("mn04", 2, target_length=32)
    with pytest.raises(ValueError, match=r"target_length=32, n_mels=128\], got \[1, 33, 128\]"):
        network(torch.zeros(1, 33, 128))
    with pytest.raises(TypeError, match=r"features must be a floating tensor, got torch\.int64"):
        network(torch.zeros(1, 32, 128, dtype=torch.int64))
    with pytest.raises(ValueError, match="sample_rate must be 16000, got 32000"):
        NetworkConfig("mn04", 2, sample_rate=32000)
    assert network.bfloat16()(torch.randn(1, 32, 128)).dtype == torch.bfloat16
