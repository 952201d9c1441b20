"""Vision pieces whose order parity alone would not explain when it breaks."""

import torch
from transformers.models.llama4.modeling_llama4 import Llama4VisionRotaryEmbedding

from herdling.model.config import VisionConfig
from herdling.model.vision import PatchEmbedding, VisionAdapter, VisionModel, rope_tables

TOY = dict(hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
           image_size=56, projector_input_dim=48, projector_output_dim=48, vision_output_dim=48)  # fmt: skip


def test_features_equal_transformers_before_the_projector(make_pair):
    reference, ours = make_pair(vision=True)
    pixels = torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = reference.get_image_features(
            pixel_values=pixels, vision_feature_select_strategy="default"
        )
        want = getattr(want, "last_hidden_state", want)
        got = ours.vision_model(pixels)
    torch.testing.assert_close(got, want.view_as(got), atol=5e-6, rtol=0)


def test_rope_turns_column_first_and_leaves_the_class_token(make_pair):
    reference, _ = make_pair(vision=True)
    table = Llama4VisionRotaryEmbedding(
        reference.config.vision_config
    ).freqs_ci  # (P + 1, 1, d / 2)
    cos, sin = rope_tables(VisionConfig(**TOY), torch.device("cpu"))
    torch.testing.assert_close(torch.complex(cos[0], sin[0]), table.squeeze(1), atol=1e-6, rtol=0)
    assert torch.equal(cos[0, -1], torch.ones_like(cos[0, -1]))
    angle = torch.atan2(sin[0, 2], cos[0, 2])  # row 0, column 2: 1-based 3 and 1
    assert round(angle[0].item(), 4) == 3.0
    assert round(angle[len(angle) // 2].item(), 4) == 1.0


def test_patches_are_channel_row_column():
    config = VisionConfig(**TOY)
    embed = PatchEmbedding(config)
    embed.linear.weight.data = torch.eye(588)[:32]
    pixels = torch.arange(3 * 56 * 56.0).view(1, 3, 56, 56)
    first = embed(pixels)[0, 5]  # patch row 1, column 1
    assert torch.equal(first[:16], torch.cat([pixels[0, 0, 14, 14:28], pixels[0, 0, 15, 14:16]]))


def test_pixel_shuffle_gathers_neighbours_in_row_order():
    config = VisionConfig(**TOY)
    adapter = VisionAdapter(config)
    adapter.mlp = torch.nn.Identity()
    cells = torch.arange(16.0)[None, :, None].expand(1, 16, 32)
    out = adapter(cells)
    assert out.shape == (1, 4, 128)
    assert out[0, :, ::32].tolist() == [
        [0, 1, 4, 5],
        [2, 3, 6, 7],
        [8, 9, 12, 13],
        [10, 11, 14, 15],
    ]


def test_tiles_do_not_see_each_other(make_pair):
    _, ours = make_pair(vision=True)
    encoder: VisionModel = ours.vision_model
    pixels = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        together, alone = encoder(pixels), encoder(pixels[:1])
    torch.testing.assert_close(together[:1], alone, atol=2e-6, rtol=0)
