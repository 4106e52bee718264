"""What a run draws on its way: sheets of prompts and edits, each with its caption, and CLIPScores of the prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from diptych.core.errors import UserError
from diptych.core.files import write_file, write_json
from diptych.core.sample import Sample
from diptych.data.imaging import as_image, to_pil, to_tensor
from diptych.data.report import sheet
from diptych.evaluation import clipscore
from diptych.evaluation.clip import Clip, check_clip
from diptych.inference.engine import Engine
from diptych.recipes.recipe import Recipe, SampleEdit
from diptych.systems.base import System
from diptych.training.metrics import Drawn

CELL = 224
"""Least width of a picture with its caption, in pixels."""
MARGINS = (12, 12)
"""Of a cell of the sheet, and of the arrow between images that are read and the one that is made."""
SCORE = "sample/clipscore"
"""Name of the prompts' score among the metrics: the mean of 100 times CLIP's cosine, not below 0 (torchmetrics)."""


def check_drawn(recipe: Recipe, system: System) -> None:
    """UserError for pictures of the run that could not be drawn or scored, before the step that would draw them."""
    drawn = recipe.run.sample_every and recipe.sample_prompts
    if (drawn or recipe.run.score_every) and "text_to_image" in system.tasks:
        try:
            system.latent_shape(*recipe.sampling.size)
            system.scale_sizes(*recipe.sampling.size)
        except UserError as error:
            raise UserError(f"sampling.size: {error}") from error
    for place, prompt in enumerate(recipe.sample_prompts):
        if "<image>" in prompt:
            raise UserError(f"sample_prompts[{place}]: {prompt!r} holds <image>, and a prompt has no images")
    if recipe.sample_edits and "edit" not in system.tasks:
        raise UserError("sample_edits: this system does not edit images; leave them out")
    for place, edit in enumerate(recipe.sample_edits):
        for path in edit.images:
            as_image(path, f"sample_edits[{place}]")
    if recipe.run.sample_clip is not None:
        if not recipe.sample_prompts:
            raise UserError("run.sample_clip scores sample_prompts, and there are none")
        check_clip(recipe.run.sample_clip, "run.sample_clip")


@dataclass
class Sampler:
    """Draws the recipe's prompts and edits into samples/ at a step, with the weights as they are.

    device: of the CLIP model. It is loaded at the first step that it scores, and kept.
    """

    system: System
    recipe: Recipe
    folder: Path
    device: str = "cpu"
    clip: Clip | None = None

    def __call__(self, step: int) -> Drawn:
        self.system.eval()
        engine = Engine(self.system, self.recipe.sampling)
        sheets: dict[Path, Image.Image] = {}
        values: dict[str, float] = {}
        path = self.folder / "samples" / f"step-{step:08d}.png"
        if prompts := self.recipe.sample_prompts:
            images = engine.generate(prompts, seed=self.recipe.seed, output_type="pt")
            samples = [
                Sample(id=f"seed {self.recipe.seed}", task="text_to_image", text=text, image=image.float().cpu())
                for text, image in zip(prompts, images, strict=True)
            ]
            if self.recipe.run.sample_clip is not None:
                samples, values = self._scored(samples, path.with_suffix(".json"))
            sheets[path] = captioned(samples)
        if edits := self.recipe.sample_edits:
            sheets[path.with_name(f"{path.stem}-edits.png")] = captioned(self._edited(engine, edits))
        for place, image in sheets.items():
            write_file(place, lambda temporary, image=image: image.save(temporary, "PNG"))
        return Drawn(sheets=sheets, values=values)

    def _scored(self, samples: Sequence[Sample], path: Path) -> tuple[list[Sample], dict[str, float]]:
        """The samples with their scores in their names, and the mean; written to `path`."""
        if self.clip is None:
            self.clip = Clip(str(self.recipe.run.sample_clip), self.device, option="run.sample_clip")
        pictures = [to_pil(sample.image) for sample in samples if sample.image is not None]
        texts = [sample.text for sample in samples]
        cosine = clipscore.cosines(self.clip.images(pictures).cpu().numpy(), self.clip.texts(texts).cpu().numpy())
        each = [round(float(score), 4) for score in clipscore.per_pair(cosine)]
        mean = clipscore.mean_then_clamp(cosine)
        rows = [{"prompt": text, "clipscore": score} for text, score in zip(texts, each, strict=True)]
        write_json(path, {"clip": self.clip.name, "clipscore": mean, "prompts": rows})
        named = [replace(x, id=f"{x.id}, CLIPScore {s:.1f}") for x, s in zip(samples, each, strict=True)]
        return named, {SCORE: mean}

    def _edited(self, engine: Engine, edits: Sequence[SampleEdit]) -> list[Sample]:
        groups = [[as_image(path) for path in edit.images] for edit in edits]
        texts = [edit.text for edit in edits]
        images = engine.edit(groups, texts, seed=self.recipe.seed, output_type="pt")
        return [
            Sample(
                id=f"seed {self.recipe.seed}",
                task="edit",
                text=text,
                context_images=tuple(map(to_tensor, group)),
                image=image.float().cpu(),
            )
            for text, group, image in zip(texts, groups, images, strict=True)
        ]


def captioned(samples: Sequence[Sample]) -> Image.Image:
    """A sheet in which the images that are made keep their size."""
    read = max(len(sample.context_images) for sample in samples)
    side = max(max(sample.image.shape[1:]) for sample in samples if sample.image is not None)
    around = sum(MARGINS) if read else MARGINS[0]
    return sheet(samples, cell=max(CELL, (1 + read) * side + around))


def sampler(system: System, recipe: Recipe, folder: Path, device: str) -> Callable[[int], Drawn] | None:
    """What draws the recipe's prompts and edits; None where it has none."""
    if not recipe.sample_prompts and not recipe.sample_edits:
        return None
    return Sampler(system, recipe, folder, device)
