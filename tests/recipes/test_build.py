from __future__ import annotations

import pytest
import torch

from diptych.checkpoints.tensors import read_tensors, weight_files
from diptych.core.errors import UserError
from diptych.recipes import build
from diptych.recipes.names import locate
from diptych.recipes.recipe import Part


@pytest.mark.parametrize("kind", ["metaquery", "residual_query_adapter"])
def test_queries_start_as_words(kind: str) -> None:
    backbone = build.build_backbone(Part(kind="internvl", weights="toy/mllm"), False, None)[0]
    config = {"queries": 3, "init_text": "top left color", **({"heads": 4} if kind != "metaquery" else {})}
    conditioner = build.build_conditioner(Part(kind=kind, config=config), backbone, False)
    ids = torch.tensor([backbone.tokenizer("top left color")["input_ids"]])
    prompt = torch.randn(1, 5, backbone.width)
    found = conditioner(prompt, torch.ones(1, 5, dtype=torch.bool))
    assert torch.allclose(found, backbone.embed(ids))  # an untrained adapter gives its queries
    assert config["init_text"], "the recipe stays as it is"
    with pytest.raises(UserError, match="init_text is 2 tokens, for 3 queries"):
        build.build_conditioner(Part(kind=kind, config={**config, "init_text": "top left"}), backbone, False)


def test_decoder_of_a_saved_model() -> None:
    """A new system may begin with the decoder that another one learned; its sizes come with it."""
    part = Part(kind="mmdit", weights="toy/iomm-pretrained")
    decoder, origin = build.build_decoder(part, 128, False)
    saved = dict(read_tensors(weight_files(locate("toy/iomm-pretrained"))))
    for name, value in decoder.state_dict().items():
        assert torch.equal(value, saved[f"decoder.{name}"].float()), name
    again = build.build_decoder(Part(**origin), 128, False)[0]  # the configuration of a saved folder has the sizes too
    assert again.state_dict().keys() == decoder.state_dict().keys()
    assert all(value.is_meta for value in build.build_decoder(part, 128, True)[0].state_dict().values())


@pytest.mark.parametrize(
    ("part", "line"),
    [
        (
            Part(kind="ovis_u1", weights="toy/iomm"),
            "toy/iomm is not a saved model that holds a decoder of kind ovis_u1",
        ),
        (Part(kind="mmdit", weights="toy/mllm"), "toy/mllm is not a saved model that holds a decoder of kind mmdit"),
        (Part(kind="mmdit", weights="toy/iomm", config={"hidden": 96}), "decoder.config.hidden: 96, but .* has 160"),
    ],
)
def test_decoder_that_a_model_lacks(part: Part, line: str) -> None:
    with pytest.raises(UserError, match=line):
        build.build_decoder(part, 128, False)
