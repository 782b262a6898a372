from __future__ import annotations

import copy
import io
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_models import features, tiny_ast, tiny_config
from torch import Tensor

import fastast
from fastast.model import AST, ASTConfig, ASTOutput
from fastast_kernels import reference

# ---------------------------------------------------------------------------------------- config


def test_published_sizes():
    assert ASTConfig() == ASTConfig.base()
    assert (ASTConfig().grid, ASTConfig().num_tokens) == ((12, 101), 1214)
    assert ASTConfig.base(target_length=512).num_tokens == 602
    assert ASTConfig.base(target_length=128).num_tokens == 146
    assert (ASTConfig.tiny().embed_dim, ASTConfig.tiny().num_heads) == (192, 3)
    assert (ASTConfig.small(depth=2).embed_dim, ASTConfig.small(depth=2).depth) == (384, 2)
    assert ASTConfig.tiny(embed_dim=96).embed_dim == 96
    with torch.device("meta"):
        model = AST(ASTConfig.base())
    unused_heads = 2 * (768 * 1000 + 1000)  # DeiT's, which the published count includes
    count = sum(p.numel() for p in model.parameters()) + unused_heads
    assert round(count / 1e6, 2) == 88.13


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"embed_dim": 65}, ValueError, "embed_dim must be a multiple of num_heads"),
        ({"depth": 0}, ValueError, "depth must be 1 or more, got 0"),
        ({"depth": 2.0}, TypeError, "depth must be an int, got 2.0"),
        ({"num_classes": True}, TypeError, "num_classes must be an int"),
        ({"target_length": 15}, ValueError, "target_length must be at least patch_size, 16"),
        ({"num_mel_bins": 8}, ValueError, "num_mel_bins must be at least patch_size, 16"),
        ({"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\), got 1.0"),
        ({"drop_path": -0.1}, ValueError, "drop_path must be finite and 0 or more"),
        ({"mlp_ratio": "4"}, TypeError, "mlp_ratio must be a number"),
        ({"mlp_ratio": 0.001}, ValueError, "mlp_ratio must leave an MLP"),
        ({"std": 0.0}, ValueError, "std must be more than 0"),
        ({"std": float("nan")}, ValueError, "std must be finite"),
        ({"labels": ["a", "b"]}, ValueError, "labels must be num_classes, 5, names or none, got 2"),
        ({"labels": [1, 2, 3, 4, 5]}, TypeError, "labels must be strings"),
    ],
)
def test_bad_config(fields, error, message):
    with pytest.raises(error, match=message):
        tiny_config(**fields)


# --------------------------------------------------------------------------------------- forward


def plain_forward(
    model: AST, x: Tensor, schedule: list[int], prop_attn: bool
) -> tuple[Tensor, Tensor]:
    """AST with published ToMe, op by op, every token in every block; logits and last source."""
    c = model.config
    batch, f_dim, t_dim = len(x), *c.grid
    patches = [
        x[:, t * c.time_stride :, f * c.frequency_stride :][:, : c.patch_size, : c.patch_size]
        for f in range(f_dim)
        for t in range(t_dim)
    ]
    patches = torch.stack(patches, 1).transpose(2, 3).flatten(2)
    patches = patches @ model.patch_embed.weight.flatten(1).T + model.patch_embed.bias
    prefix = torch.cat([model.cls_token, model.dist_token], 1).expand(batch, -1, -1)
    x = torch.cat([prefix, patches], 1) + model.pos_embed
    n = x.shape[1]
    size, source = torch.ones(batch, n), torch.arange(n).expand(batch, n)
    for block, r in zip(model.blocks, schedule, strict=True):
        qkv = block.attn.qkv(block.norm1(x))
        q, k, v = qkv.unflatten(-1, (3, c.num_heads, -1)).permute(2, 0, 3, 1, 4)
        logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        if prop_attn:
            logits = logits + size.log()[:, None, None]
        out = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + block.attn.proj(out)
        n = x.shape[1]
        r = max(0, min(r, (n - 2) // 2))
        assignment = reference.bipartite_match(k.mean(1), r)
        rows = F.one_hot(assignment.long(), n - r).transpose(1, 2).float()  # [B, n_out, n]
        x = rows @ (x * size[..., None])
        size = (rows @ size[..., None]).squeeze(-1)
        x = x / size[..., None]
        source = assignment.gather(1, source).long()
        x = x + block.mlp(block.norm2(x))
    y = model.norm(x)
    return model.head((y[:, 0] + y[:, 1]) / 2), source


@pytest.mark.parametrize("prop_attn", [True, False], ids=["prop", "plain"])
@pytest.mark.parametrize("r", [0, 2, 5, 100, (4, -1.0), [0, 6, 1]], ids=str)
def test_logits_are_those_of_the_published_algorithm(r, prop_attn):
    model, x = tiny_ast(), features()
    fastast.patch(model, r=r, prop_attn=prop_attn, trace=True)
    with torch.no_grad():
        logits, source = plain_forward(model, x, fastast.tome.parse_r(3, r), prop_attn)
        torch.testing.assert_close(model(x), logits, atol=2e-5, rtol=1e-4)
    assert torch.equal(model.tome.source, source.int())


def test_merging_and_proportional_attention_change_the_logits():
    model, x = tiny_ast(), features()
    plain = model(x)
    fastast.patch(model, r=8)
    merged = model(x)
    assert (merged - plain).abs().max() > 1e-3
    model.tome.prop_attn = False
    assert (model(x) - merged).abs().max() > 1e-4


def test_tokens_are_frequency_major():
    model, x = tiny_ast(), features(1)
    f_dim, t_dim = model.config.grid
    changed = x.clone()
    changed[:, 16 + 7 * 10 :, 16 + 2 * 10 :] += 1  # only the last patch row and column reach it
    moved = (model._embed(x) - model._embed(changed)).abs().amax((0, 2)) > 0
    assert moved.nonzero().flatten().tolist() == [2 + (f_dim - 1) * t_dim + t_dim - 1]


@pytest.mark.parametrize("r", [0, 5, (4, -1.0)], ids=str)
def test_trimming_the_last_block_is_exact(r):
    model, x = fastast.patch(tiny_ast(), r=r), features()
    full = model(x, return_hidden_states=True)
    assert isinstance(full, ASTOutput)
    torch.testing.assert_close(model(x), full.logits, atol=1e-6, rtol=1e-6)

    schedule = fastast.tome.parse_r(3, r)
    lengths = [38 - sum(schedule[:i]) for i in range(4)]
    assert [h.shape[1] for h in full.hidden_states] == lengths
    assert full.attentions is None
    y = model.norm(full.hidden_states[-1])
    torch.testing.assert_close(model.forward_features(x), y)
    torch.testing.assert_close(model.head((y[:, 0] + y[:, 1]) / 2), full.logits)


def test_trimmed_gradients_are_those_of_the_whole_block():
    model, x = fastast.patch(tiny_ast(), r=3), features()
    grads = []
    for everything in (False, True):
        model.zero_grad()
        out = model(x, return_hidden_states=everything)
        (out.logits if everything else out).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for trimmed, full in zip(*grads, strict=True):
        torch.testing.assert_close(trimmed, full, atol=1e-4, rtol=1e-4)


def test_attentions_weigh_keys_by_their_size():
    model, x = fastast.patch(tiny_ast(), r=[9, 0, 0]), features()
    out = model(x, return_attentions=True)
    assert out.hidden_states is None
    assert [a.shape for a in out.attentions] == [(2, 2, n, n) for n in (38, 29, 29)]
    for attention in out.attentions:
        torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:-1]))
    torch.testing.assert_close(out.logits, model(x), atol=1e-5, rtol=1e-5)
    model.tome.prop_attn = False
    flat = model(x, return_attentions=True)
    assert torch.equal(flat.attentions[0], out.attentions[0])
    assert not torch.allclose(flat.attentions[1], out.attentions[1], atol=1e-3)


@pytest.mark.parametrize("r", [0, 7])
def test_tracing_does_not_touch_the_logits(r):
    model, x = fastast.patch(tiny_ast(), r=r), features()
    plain = model(x)
    assert model.tome.source is None
    fastast.patch(model, r=r, trace=True)
    assert torch.equal(model(x), plain)
    assert model.tome.source.dtype == torch.int32
    if r == 0:
        assert torch.equal(model.tome.source, torch.arange(38).int().repeat(2, 1))
    trimmed = model.tome.source
    model(x, return_hidden_states=True)
    assert torch.equal(model.tome.source, trimmed)


def test_r_zero_is_bit_for_bit_the_unpatched_model():
    model, x = tiny_ast(), features()
    plain = model(x)
    for r in (0, [0, 0, 0], (0, -1)):
        assert torch.equal(fastast.patch(model, r=r)(x), plain)
    model.r = [0, 0, 9]  # in the last block, r cannot change what the head reads
    assert torch.equal(model(x), plain)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("r", [0, 4])
def test_shallow_models(depth, r):
    model, x = fastast.patch(tiny_ast(depth=depth), r=r), features()
    with torch.no_grad():
        wanted, _ = plain_forward(model, x, [r] * depth, True)
    torch.testing.assert_close(model(x), wanted, atol=2e-5, rtol=1e-4)


# ------------------------------------------------------------------------------------- bad input


def test_wrong_features():
    model = tiny_ast()
    with pytest.raises(
        ValueError, match=r"\[batch, target_length=96, num_mel_bins=48\], got \[2, 48, 96\]"
    ):
        model(features().transpose(1, 2))
    with pytest.raises(ValueError, match=r"got \[96, 48\]"):
        model(features()[0])
    with pytest.raises(TypeError, match=r"features must be a floating tensor, got torch.int64"):
        model(features().long())
    with pytest.raises(TypeError, match="features must be a floating tensor, got list"):
        model([1.0])
    with pytest.raises(ValueError, match="features must be on the model's device, cpu, got meta"):
        model(features().to("meta"))


def test_nan_features_do_not_merge_silently():
    model, x = fastast.patch(tiny_ast(), r=3), features()
    x[1, 40, 20] = float("nan")
    with pytest.raises(RuntimeError, match="metric must be finite"):
        model(x)


def test_empty_batch():
    model = fastast.patch(tiny_ast(), r=3)
    assert model(features(0)).shape == (0, 5)


def test_features_come_in_any_floating_dtype():
    model, x = fastast.patch(tiny_ast(), r=4), features()
    assert torch.equal(model(x.double()), model(x))
    low = copy.deepcopy(model).bfloat16()
    assert low(x).dtype == torch.bfloat16
    assert (low(x).float() - model(x)).abs().max() < 0.1 * model(x).abs().max()


# --------------------------------------------------------------------------------------- training


def _gradients(model: AST, x: Tensor) -> list[Tensor]:
    torch.manual_seed(11)  # of dropout and stochastic depth
    model.zero_grad()
    model(x).square().sum().backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("regularised", [False, True])
def test_gradient_checkpointing_changes_no_gradient(regularised):
    rates = {"dropout": 0.1, "drop_path": 0.3} if regularised else {}
    model, x = fastast.patch(tiny_ast(**rates), r=(4, -0.5), trace=True).train(), features()
    plain = _gradients(model, x)
    source = model.tome.source
    model.gradient_checkpointing = True
    for again, grad in zip(_gradients(model, x), plain, strict=True):
        assert torch.equal(again, grad)
    assert torch.equal(model.tome.source, source)


def test_stochastic_depth_and_dropout_are_off_outside_training():
    model, x = tiny_ast(dropout=0.2, drop_path=0.5), features()
    wanted, _ = plain_forward(model, x, [0, 0, 0], True)
    torch.testing.assert_close(model(x), wanted, atol=2e-5, rtol=1e-4)
    model.train()
    assert not torch.equal(model(x), model(x))
    assert [block.residual.drop_path for block in model.blocks] == [0.0, 0.25, 0.5]

    residual = fastast.model.Residual(0.0, 0.25).train()
    torch.manual_seed(0)
    kept = residual(torch.ones(4000, 2, 3))
    assert set(kept.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert kept.mean().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(kept, kept[:, :1, :1].expand_as(kept))  # a sample is kept or dropped whole


def test_autocast_is_close_and_trains():
    model, x = fastast.patch(tiny_ast(), r=4), features()
    exact = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(x)
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).abs().max() < 0.05 * exact.abs().max()
    rough.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def _train_one_step(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    model = fastast.patch(tiny_ast(), r=4).train()
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    for step in range(2):  # the second fails if a parameter got no gradient in the first
        wrapped(features(4, seed=step)[2 * rank : 2 * rank + 2]).square().mean().backward()
    if rank == 0:
        torch.save([p.grad for p in model.parameters()], f"{folder}/gradients.pt")
    torch.distributed.destroy_process_group()


def test_ddp_averages_the_gradients_of_both_halves(tmp_path: Path):
    torch.multiprocessing.spawn(_train_one_step, (str(tmp_path),), nprocs=2)
    model = fastast.patch(tiny_ast(), r=4).train()
    for step in range(2):
        model(features(4, seed=step)).square().mean().backward()
    for grad, p in zip(
        torch.load(tmp_path / "gradients.pt", weights_only=True), model.parameters(), strict=True
    ):
        torch.testing.assert_close(grad, p.grad, atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------- threads, compile, pickling


def test_two_threads_share_a_model():
    model = fastast.patch(tiny_ast(), r=5)
    inputs = [features(seed=seed) for seed in range(2)]
    with torch.no_grad():
        wanted = [model(x) for x in inputs]
        got: list[list[Tensor]] = [[], []]

        def work(i: int) -> None:
            with torch.no_grad():
                got[i] = [model(inputs[i]) for _ in range(20)]

        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for i in range(2):
        assert len(got[i]) == 20
        assert all(torch.equal(logits, wanted[i]) for logits in got[i])


@pytest.mark.parametrize("trace", [False, True])
def test_compiles_into_one_graph_and_only_once(trace):
    torch._dynamo.reset()
    model, x = fastast.patch(tiny_ast(), r=5, trace=trace), features()
    eager, source = model(x), model.tome.source
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), eager)
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(compiled(features(seed=9)), model(features(seed=9)))
        compiled(x).sum().backward()
    if trace:
        assert torch.equal(model.tome.source, source)
    model.r = (4, -1.0)
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("wanted", [False, True])
def test_merges_are_given_the_sources_where_they_are_read(wanted, monkeypatch):
    """On CUDA C++; elsewhere no block asks for them."""
    model, x = fastast.patch(tiny_ast(), r=5), features()
    expected = model(x)
    given = []

    def merge(*args, sources, **kwargs):
        given.append(sources)
        if sources is not None:
            assert torch.equal(sources, reference.sources(args[2], args[3]))
        return merge_add_layer_norm(*args, sources=sources, **kwargs)

    merge_add_layer_norm = fastast.model.merge_add_layer_norm
    monkeypatch.setattr(fastast.model, "merge_add_layer_norm", merge)
    if wanted:
        monkeypatch.setattr(fastast.tome, "runs_in_cuda", lambda op, x: True)
    assert torch.equal(model(x), expected)
    assert [sources is not None for sources in given] == [wanted] * 2  # the last block is trimmed


def test_compiles_with_sources(monkeypatch):
    torch._dynamo.reset()
    model, x = fastast.patch(tiny_ast(), r=5), features()
    eager = _gradients(model, x)
    monkeypatch.setattr(fastast.tome, "runs_in_cuda", lambda op, x: True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for grad, wanted in zip(_gradients(compiled, x), eager, strict=True):
        torch.testing.assert_close(grad, wanted, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        ops = {str(node.target) for node in torch.export.export(model, (x,)).graph.nodes}
    assert "fastast.match_keys_sources.default" in ops


def test_compiled_gradients():
    torch._dynamo.reset()
    model, x = fastast.patch(tiny_ast(), r=5), features()
    eager = _gradients(model, x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for grad, wanted in zip(_gradients(compiled, x), eager, strict=True):
        torch.testing.assert_close(grad, wanted, atol=1e-5, rtol=1e-4)


def test_exports_with_a_batch_of_any_size():
    model = fastast.patch(tiny_ast(), r=5)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(model, (features(2),), dynamic_shapes=({0: batch},)).module()
    for size in (1, 3):
        torch.testing.assert_close(exported(features(size)), model(features(size)))


@pytest.mark.slow
def test_inductor():
    """One block in the middle of a model: it has everything, and compiles in seconds."""
    torch._dynamo.reset()
    model = fastast.patch(tiny_ast(), r=5)
    tokens, size = torch.randn(2, 2, 33, 64), torch.randint(1, 4, (2, 33)).float()
    block = torch.compile(model.blocks[1], fullgraph=True)
    with torch.no_grad():
        state = (*tokens, size, size.log(), None, model.tome, 5, None, False)
        for got, wanted in zip(block(*state), model.blocks[1](*state), strict=True):
            torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


def test_patched_models_copy_and_pickle():
    model, x = fastast.patch(tiny_ast(), r=5), features()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(twin(x), model(x))
        twin.r = 0
        assert not torch.equal(twin(x), model(x))


def test_position_embeddings_start_as_places() -> None:
    model = AST(ASTConfig.tiny(num_classes=2, target_length=128))
    places = model.pos_embed[0, 2:].detach()
    f_dim, t_dim = model.config.grid
    distance = torch.cdist(places, places)
    grid = torch.cartesian_prod(torch.arange(f_dim), torch.arange(t_dim))
    steps = (grid[:, None] - grid).abs().sum(2)
    # Frequency-major, as the model counts patches; neighbours are closest, no two are the same.
    assert distance[steps == 1].max() < distance[steps > 2].min()
    assert distance[steps == 1].min() > 0.1
    half = torch.full((f_dim * t_dim,), 192 / 2)
    torch.testing.assert_close(places.square().sum(1), half, rtol=1e-3, atol=1e-3)
