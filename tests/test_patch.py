from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import features, tiny_ast
from torch import nn

import fastast
from fastast.adapters import ast as ast_adapter


def anatomy(model: nn.Module) -> dict[str, dict[str, Any]]:
    """All that is stored on every module, containers copied, to compare before and after."""
    return {
        name: {key: dict(v) if isinstance(v, dict) else v for key, v in vars(module).items()}
        for name, module in model.named_modules()
    }


def test_patch_returns_the_model_and_changes_no_key():
    model = tiny_ast()
    keys = list(model.state_dict())
    modules = [name for name, _ in model.named_modules()]
    assert fastast.patch(model, r=4, trace=True) is model
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_modules()] == modules
    assert fastast.unpatch(model) is model


def test_unpatch_restores_everything():
    model, x = tiny_ast(), features()
    before, plain = anatomy(model), model(x)
    fastast.patch(model, r=[3, 2, 1], prop_attn=False, trace=True)
    assert not torch.equal(model(x), plain)
    fastast.unpatch(model)
    assert anatomy(model) == before
    assert torch.equal(model(x), plain)
    fastast.unpatch(model)  # a second time is no error
    assert anatomy(model) == before


def test_patching_twice_is_patching_once():
    once, twice, x = tiny_ast(), tiny_ast(), features()
    before = anatomy(twice)
    fastast.patch(twice, r=9, prop_attn=False, trace=True)
    fastast.patch(twice, r=4)
    assert torch.equal(twice(x), fastast.patch(once, r=4)(x))
    assert twice.tome.source is None
    fastast.unpatch(twice)
    assert anatomy(twice) == before


def test_r_is_read_and_set_on_the_model():
    model, x = tiny_ast(), features()
    assert model.r == 0
    fastast.patch(model, r=(3, -0.5))
    assert model.r == (3, -0.5)
    slope = model(x)
    model.r = [5, 3, 1]  # what (3, -0.5) means
    assert model.r == [5, 3, 1]
    assert torch.equal(model(x), slope)
    model.r[0] = 99  # a list is copied: no way around the check
    assert torch.equal(model(x), slope)


def test_wrong_r_leaves_the_model_as_it_was():
    model = tiny_ast()
    before = anatomy(model)
    for r, error in ((-1, ValueError), (2.5, TypeError), ([1, 2], ValueError)):
        with pytest.raises(error, match="r "):
            fastast.patch(model, r=r)
    with pytest.raises(ValueError, match="policy must be one of"):
        fastast.patch(model, r=1, policy="hope")
    assert anatomy(model) == before
    fastast.patch(model, r=3)
    with pytest.raises(ValueError, match="one int a block, 3 for this model, got 4"):
        model.r = [1, 2, 3, 4]
    with pytest.raises(TypeError, match="got True"):
        model.r = True
    assert model.r == 3


def test_r_of_an_unpatched_model_cannot_be_set():
    model = tiny_ast()
    with pytest.raises(RuntimeError, match=r"call fastast\.patch"):
        model.r = 3
    assert model.r == 0


def test_patched_is_for_the_length_of_the_block():
    model, x = tiny_ast(), features()
    before, plain = anatomy(model), model(x)
    with fastast.patched(model, r=6, trace=True) as inside:
        assert inside is model
        assert not torch.equal(model(x), plain)
        assert model.tome.source is not None
    assert anatomy(model) == before
    with pytest.raises(KeyError), fastast.patched(model, r=6):
        raise KeyError
    assert anatomy(model) == before


def test_patched_gives_an_earlier_patch_back():
    model, x = fastast.patch(tiny_ast(), r=3, prop_attn=False), features()
    earlier, settings = model(x), model.tome
    with fastast.patched(model, r=8):
        assert not torch.equal(model(x), earlier)
    assert model.r == 3
    assert model.tome is settings
    assert torch.equal(model(x), earlier)


@pytest.mark.parametrize(
    "model", [nn.Linear(2, 2), None, nn.TransformerEncoderLayer(8, 2)], ids=str
)
def test_unknown_models_are_refused(model):
    for function in (fastast.patch, fastast.unpatch):
        with pytest.raises(TypeError, match=r"model must be a fastast\.AST or a transformers AST"):
            function(model)
    with pytest.raises(TypeError, match=type(model).__name__), fastast.patched(model):
        pass


def test_a_compiled_model_is_to_be_patched_first():
    with pytest.raises(TypeError, match="patched before it is compiled or wrapped"):
        fastast.patch(torch.compile(tiny_ast()))


def test_current_is_none_or_the_settings():
    model = tiny_ast()
    assert ast_adapter.current(model) is None
    fastast.patch(model, r=2)
    assert ast_adapter.current(model) == (2, model.tome)


def test_import_is_light():
    """Importing fastast pulls in no optional library, and touches no GPU."""
    heavy = "transformers timm torchaudio torchvision matplotlib soundfile accelerate rich typer"
    code = (
        "import sys, fastast, torch\n"
        f"print([m for m in {heavy.split()} if m in sys.modules], torch.cuda.is_initialized())\n"
    )
    root = Path(fastast.__file__).parents[1]
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[] False"
