"""Mask2Former's raw output read out as instances."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from diptych.evaluation.geneval_models import read_out


def test_masks_and_boxes_are_those_of_the_logits() -> None:
    torch.manual_seed(0)
    classes, masks = 9 * torch.randn(12, 81), torch.randn(12, 8, 8) - 0.5
    masks[3] = -1.0  # an empty mask is no object
    found = read_out(classes, masks, (64, 64), (64, 48), (40, 30), 0.05)
    assert len(found) >= 5
    scores = [each.score for each in found]
    assert scores == sorted(scores, reverse=True)
    assert min(scores) > 0.05
    probability = classes.softmax(-1)[:, :-1]
    for each in found:
        grown = F.interpolate(masks[None], (64, 64), mode="bilinear", align_corners=False)[..., :48]
        logits = F.interpolate(grown, (40, 30), mode="bilinear", align_corners=False)[0].numpy()
        (query,) = [q for q in range(12) if np.array_equal(logits[q] > 0, each.mask)]
        inside = logits[query] > 0
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        assert each.box == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        certainty = (1 / (1 + np.exp(-logits[query][inside]))).mean()
        assert each.score == pytest.approx(float(probability[query, each.label]) * certainty, rel=1e-4)
    assert read_out(classes, masks, (64, 64), (64, 48), (40, 30), 1.0) == []
    assert read_out(classes, masks - 9, (64, 64), (64, 48), (40, 30), 0.05) == []
