"""Sizes of published networks at which tests build them; a test adds what it needs besides."""

from __future__ import annotations

from typing import Any

KL: dict[str, Any] = {
    "block_out_channels": (8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "latent_channels": 4,
}
DC: dict[str, Any] = {
    "latent_channels": 4,
    "attention_head_dim": 4,
    "encoder_block_out_channels": (8, 8),
    "decoder_block_out_channels": (8, 8),
    "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
    "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
    "encoder_layers_per_block": (1, 1),
    "decoder_layers_per_block": (1, 1),
    "encoder_qkv_multiscales": ((), (5,)),
    "decoder_qkv_multiscales": ((), (5,)),
}
PUBLISHED_DC: dict[str, Any] = {
    **DC,
    "decoder_norm_types": "batch_norm",
    "decoder_act_fns": "relu",
    "upsample_block_type": "interpolate",
    "downsample_block_type": "conv",
    "scaling_factor": 0.41407,
}
SANA: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 2,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 8,
    "cross_attention_dim": 16,
    "caption_channels": 12,
}
QWEN_IMAGE: dict[str, Any] = {
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "axes_dims_rope": (4, 6, 6),
}
FLUX_LIKE: dict[str, Any] = {
    "channels": 3,
    "patch": 8,
    "hidden": 16,
    "heads": 1,
    "double": 1,
    "single": 1,
    "axes": [4, 6, 6],
}
DECODER_SIZES: dict[str, dict[str, Any]] = {
    "mmdit": FLUX_LIKE,
    "ovis_u1": FLUX_LIKE,
    "omnigen2": {
        "patch_size": 8, "in_channels": 3, "hidden_size": 24, "num_layers": 1, "num_refiner_layers": 1,
        "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 8, "axes_dim_rope": [4, 4, 4],
        "axes_lens": [512, 64, 64], "text_feat_dim": 12,
    },
    "zimage": {
        "in_channels": 3, "dim": 32, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
        "cap_feat_dim": 12, "axes_dims": [4, 6, 6], "axes_lens": [512, 32, 32],
    },
    "sana": {
        "in_channels": 3, "out_channels": 3, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1,
        "num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16,
        "caption_channels": 12,
    },
    "sd3": {
        "in_channels": 3, "out_channels": 3, "patch_size": 2, "num_layers": 1, "attention_head_dim": 8,
        "num_attention_heads": 2, "joint_attention_dim": 12, "caption_projection_dim": 16, "pooled_projection_dim": 10,
        "sample_size": 32, "pos_embed_max_size": 32,
    },
    "qwen_image": {
        "in_channels": 12, "out_channels": 3, "num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
        "joint_attention_dim": 12, "axes_dims_rope": [4, 6, 6],
    },
}  # fmt: skip
"""Of every decoder of the tables, for a condition of width 12 or 24 and pictures of three channels."""
