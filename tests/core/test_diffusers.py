"""diffusers' transformers, tiny and random, sparse without `torch.compile`."""

import pytest
import torch

import afbs_compile
from afbs_compile.logs import AfbsWarning
from afbs_compile.report import JOURNAL

diffusers = pytest.importorskip("diffusers")

OPTIONS = {"min_length": 128, "max_error": 0.3}
TEXT = 24
pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo", "always_faster", "clean"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture
def clean():
    JOURNAL.clear()
    yield
    JOURNAL.clear()


def flux():
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=32,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32,
        axes_dims_rope=[8, 12, 12],
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 256, 4), "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": torch.randn(1, TEXT, 32),
        "pooled_projections": torch.randn(1, 32),
        "img_ids": torch.rand(256, 3), "txt_ids": torch.zeros(TEXT, 3),
    }  # fmt: skip
    return model, inputs, {"transformer_blocks.0.attn", "single_transformer_blocks.0.attn"}


def sd3():
    model = diffusers.SD3Transformer2DModel(
        sample_size=32, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=32,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=64,
        pooled_projection_dim=64, out_channels=4,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 4, 32, 32), "timestep": torch.tensor([5]),
        "encoder_hidden_states": torch.randn(1, TEXT, 32),
        "pooled_projections": torch.randn(1, 64),
    }  # fmt: skip
    return model, inputs, {f"transformer_blocks.{n}.attn" for n in range(2)}


def wan():
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=32, in_channels=4,
        out_channels=4, text_dim=16, freq_dim=32, ffn_dim=32, num_layers=1, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", rope_max_seq_len=64,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 4, 2, 24, 24), "timestep": torch.tensor([5]),
        "encoder_hidden_states": torch.randn(1, TEXT, 16),
    }  # fmt: skip
    return model, inputs, {"blocks.0.attn1", "blocks.0.attn2"}


def run(model, inputs):
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]


@pytest.mark.slow
@pytest.mark.parametrize("make", [flux, sd3, wan])
def test_every_attention_of_a_denoiser_is_sparse(make):
    from afbs_compile.integrations import diffusers as integration

    torch.manual_seed(0)
    model, inputs, names = make()
    model.eval()
    dense = run(model, inputs)
    with integration.enable(model, **OPTIONS):
        sparse = run(model, inputs)
        assert torch.equal(run(model, inputs), sparse)
    assert {s.name for s in afbs_compile.explain().sites if s.decision == "sparse"} == names
    assert not torch.equal(sparse, dense)
    assert (sparse - dense).abs().sum() < 0.3 * dense.abs().sum()
    assert torch.equal(run(model, inputs), dense)


def test_pipelines_give_their_denoisers_and_nothing_else():
    from afbs_compile.integrations import diffusers as integration

    class Pipe:
        transformer, vae, unet = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), None

    assert integration.denoisers(Pipe()) == {"transformer": Pipe.transformer}
    with integration.enable(Pipe()):
        assert len(Pipe.transformer._forward_pre_hooks) > 0
        assert not Pipe.vae._forward_pre_hooks
    assert not Pipe.transformer._forward_pre_hooks
    with pytest.raises(ValueError, match="has none of transformer"):
        integration.enable(object())


def test_another_attention_backend_is_said():
    from afbs_compile.integrations import diffusers as integration

    model, _, _ = flux()
    assert integration.backend_of(model) is None
    model.transformer_blocks[0].attn.processor._attention_backend = "flash"
    with pytest.warns(AfbsWarning, match="'flash'.*reset_attention_backend"):
        integration.enable(model).close()
