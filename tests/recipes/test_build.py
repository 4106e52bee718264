from __future__ import annotations

import pytest
import torch

from diptych.core.errors import UserError
from diptych.recipes import build
from diptych.recipes.recipe import Part


@pytest.mark.parametrize("kind", ["metaquery", "residual_query_adapter"])
def test_queries_start_as_words(kind: str) -> None:
    backbone = build.build_backbone(Part(kind="internvl", weights="toy/mllm"), False, None)[0]
    config = {"queries": 3, "words": "top left color", **({"heads": 4} if kind != "metaquery" else {})}
    conditioner = build.build_conditioner(Part(kind=kind, config=config), backbone, False)
    ids = torch.tensor([backbone.tokenizer("top left color")["input_ids"]])
    prompt = torch.randn(1, 5, backbone.width)
    found = conditioner(prompt, torch.ones(1, 5, dtype=torch.bool))
    assert torch.allclose(found, backbone.embed(ids))  # an untrained adapter gives its queries
    assert config["words"], "the recipe stays as it is"
    with pytest.raises(UserError, match="the words are 2 tokens, for 3 queries"):
        build.build_conditioner(Part(kind=kind, config={**config, "words": "top left"}), backbone, False)
