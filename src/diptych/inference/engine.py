"""Batched generation, editing and understanding with any system of the contract."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diptych.core.condition import Condition
from diptych.core.draws import Draws, key
from diptych.core.errors import UserError, unknown
from diptych.core.sample import IMAGE_PLACEHOLDER, Batch, Message, Sample
from diptych.core.tokens import drawn
from diptych.inference.coarse_to_fine import View, views
from diptych.inference.guidance import ALWAYS, Rule, guided, plan
from diptych.inference.renormalise import Nested, Renorm, nested
from diptych.inference.sampler import Method, sample, span, times
from diptych.objectives.flow_matching import resolution_shift, root_shift
from diptych.systems.base import Dropped, ImageSized, Reasoner, System, Thinker


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How images are sampled; a model's folder may carry its own defaults.

    size: (height, width) in pixels; some systems give edits the shape of their image where none is asked for. steps:
    sampler steps. cfg: text guidance scale, 1 for none.
    image_cfg: image guidance scale in editing, 1 for text guidance alone. guidance: which branches these scales compare
    (`inference.guidance.Rule`). cfg_range: steps that are guided, first and last as shares of all steps. negative: the
    text that guidance leads away from. shift: of the times; "root" (OmniGen2's) and "flux" go by the latent's size.
    batch_size: images per decoder run (each takes as many rows as guidance has branches).
    cfg_interval, renorm, renorm_min: of guidance "bagel" (`inference.renormalise.Nested`). think: tokens that a model
    may write before each image about what is to be in it, 0 for none; think_temperature: they are drawn at, 0 for the
    likeliest. edit: other values of these fields for edits.
    """

    size: tuple[int, int] = (512, 512)
    steps: int = 25
    cfg: float = 4.0
    image_cfg: float = 1.0
    guidance: Rule = "chain"
    cfg_range: tuple[float, float] = (0.0, 1.0)
    negative: str = ""
    shift: float | Literal["root", "flux"] = 1.0
    method: Method = "euler"
    batch_size: int = 16
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    renorm: Renorm = "none"
    renorm_min: float = 0.0
    think: int = 0
    think_temperature: float = 0.0
    edit: dict[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"steps must be at least 1, not {self.steps}")
        if self.batch_size < 1:
            raise UserError(f"batch_size must be at least 1, not {self.batch_size}")
        if self.cfg < 0 or self.image_cfg < 0:
            raise UserError(f"guidance scales must not be negative (cfg {self.cfg}, image_cfg {self.image_cfg})")
        if self.shift not in ("root", "flux") and (isinstance(self.shift, str) or self.shift <= 0):
            raise UserError(f"shift must be above 0, or 'root' or 'flux', not {self.shift!r}")
        object.__setattr__(self, "cfg_range", tuple(self.cfg_range))
        if len(self.cfg_range) != 2 or not 0 <= self.cfg_range[0] <= self.cfg_range[1] <= 1:
            raise UserError(f"cfg_range must be two rising shares of the steps from 0 to 1, not {self.cfg_range}")
        object.__setattr__(self, "cfg_interval", tuple(self.cfg_interval))
        if len(self.cfg_interval) != 2 or not 0 <= self.cfg_interval[0] <= self.cfg_interval[1] <= 1:
            raise UserError(f"cfg_interval must be two rising times from 0 to 1, not {self.cfg_interval}")
        nested_only = (self.cfg_interval, self.renorm, self.renorm_min) != ((0.0, 1.0), "none", 0.0)
        if nested_only and self.guidance != "bagel":
            raise UserError("cfg_interval, renorm and renorm_min belong to guidance 'bagel'")
        if self.guidance == "bagel" and self.cfg_range != (0.0, 1.0):
            raise UserError("cfg_range does not go with guidance 'bagel'; it has cfg_interval")
        if self.think < 0:
            raise UserError(f"think must not be negative, not {self.think}")
        if not 0 <= self.think_temperature < float("inf"):
            raise UserError(f"think_temperature must not be negative, not {self.think_temperature}")
        for name in self.edit:
            if name == "edit" or name not in [row.name for row in fields(self)]:
                raise unknown("option", name, [row.name for row in fields(self)], "edit")
        if self.edit:
            replace(self, **{**self.edit, "edit": {}})


class Engine:
    """A loaded model.

    Args:
        system: any system of the contract, in eval mode.
        sampling: its defaults.
        name: how the user called it.
    """

    def __init__(self, system: System, sampling: Sampling, name: str = "model") -> None:
        self.system = system.eval()
        self.sampling = sampling
        self.name = name

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        n: int = 1,
        seed: int = 0,
        progress: Progress | None = None,
        thoughts: list[str] | None = None,
        **options: Any,
    ) -> list[Image.Image]:
        """Images for one prompt or several, n each, prompt by prompt.

        A model of several scales makes the last one, or those of `scales` ("all", or names as in "4x4,8x8"), which then
        follow each other, coarse before fine. Other `options` are fields of `Sampling` (`size` may be one number).
        The same (seed, prompt position, image position) gives the same noise for any batch size. A list given as
        `thoughts` is extended by the thought that each image was made from, where the model thinks.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        empty = [i for i, text in enumerate(prompts) if not text.strip()]
        if empty:
            raise UserError(f"prompt {empty[0]} is empty")
        samples = [Sample(id=f"prompt {i}", task="text_to_image", text=text) for i, text in enumerate(prompts)]
        made = self.tensors(samples, n=n, seed=seed, progress=progress, thoughts=thoughts, **options)
        return [to_pil(x) for x in made]

    def edit(
        self,
        image: Image.Image | Sequence[Image.Image | Sequence[Image.Image]],
        instruction: str | Sequence[str],
        *,
        n: int = 1,
        seed: int = 0,
        progress: Progress | None = None,
        **options: Any,
    ) -> list[Image.Image]:
        """Edited images. One instruction goes with one image, or with several that it refers to; a list of
        instructions goes with a list of as many images (or lists of images)."""
        if isinstance(instruction, str):
            texts = [instruction]
            groups = [[image] if isinstance(image, Image.Image) else list(flat(image))]
        else:
            texts = list(instruction)
            entries = [image] if isinstance(image, Image.Image) else list(image)
            groups = [[entry] if isinstance(entry, Image.Image) else list(entry) for entry in entries]
        if len(groups) != len(texts):
            raise UserError(f"{len(groups)} images but {len(texts)} instructions; give one instruction per image")
        samples = [
            Sample(id=f"edit {i}", task="edit", text=text, context_images=tuple(from_pil(picture) for picture in group))
            for i, (group, text) in enumerate(zip(groups, texts, strict=True))
        ]
        return [to_pil(x) for x in self.tensors(samples, n=n, seed=seed, progress=progress, **options)]

    def ask(
        self,
        image: Image.Image | Sequence[Image.Image] | None,
        question: str | Sequence[str],
        *,
        max_new_tokens: int = 64,
        think: bool = False,
    ) -> str | list[str]:
        """Answers. One question (with one image, several, or none) gives a string; a list of questions goes with a
        list of as many images, one each, and gives a list. With `think`, models that can write down their thoughts
        first."""
        if isinstance(question, str):
            group = [] if image is None else [image] if isinstance(image, Image.Image) else list(image)
            questions, groups = [question], [group]
        else:
            if image is None or isinstance(image, Image.Image) or len(image) != len(question):
                raise UserError(f"{len(question)} questions need as many images")
            questions, groups = list(question), [[picture] for picture in image]
        conversations = [
            [Message(role="user", text=f"{IMAGE_PLACEHOLDER}\n" * len(group) + text)]
            for text, group in zip(questions, groups, strict=True)
        ]
        if think:
            conversations = [self._reasoner().reasoning(conversation) for conversation in conversations]
        device = self.system.device
        tensors = [[from_pil(picture).to(device) for picture in group] for group in groups]
        answers: list[str] = []
        step = self.sampling.batch_size
        for start in range(0, len(questions), step):
            rows = slice(start, start + step)
            answers += self.system.generate_text(conversations[rows], tensors[rows], max_new_tokens=max_new_tokens)
        return answers[0] if isinstance(question, str) else answers

    @torch.no_grad()
    def tensors(
        self,
        samples: Sequence[Sample],
        *,
        n: int,
        seed: int,
        scales: str = "last",
        positions: Sequence[int] | None = None,
        progress: Progress | None = None,
        thoughts: list[str] | None = None,
        **options: Any,
    ) -> list[Tensor]:
        """Images (3, H, W) in [-1, 1] for requests, n each, request by request, each at the wanted `scales`.

        The condition of a request is computed once, however many images and scales are drawn from it, and the null
        condition of guidance once for all of a size. A request that says its size has that one; an edit by a system
        whose edits have the shape of their image has that, unless `size` is among the options.

        Args:
            positions: of the requests in a longer list, by which their noise is drawn; their own places when None.
            thoughts: extended by the thought that each image was made from, where the model thinks.
        """
        if n < 1:
            raise UserError(f"n must be at least 1, not {n}")
        settings = self._settings(options, edits=all(sample.task == "edit" for sample in samples))
        samples = [replace(sample, size=self._size(sample, settings, "size" in options)) for sample in samples]
        sizes = list(dict.fromkeys(sample.size for sample in samples))
        if len(sizes) > 1:
            places = [[row for row, sample in enumerate(samples) if sample.size == size] for size in sizes]
            found: dict[int, list[Tensor]] = {}
            thought: dict[int, list[str]] = {}
            for rows in places:
                before = len(found)
                heard: list[str] = []
                own = self.tensors(
                    [samples[row] for row in rows],
                    n=n,
                    seed=seed,
                    scales=scales,
                    positions=rows if positions is None else [positions[row] for row in rows],
                    progress=None if progress is None else later(progress, before, len(rows), len(samples)),
                    thoughts=heard,
                    **options,
                )
                each = len(own) // len(rows)
                found |= {row: own[at * each : (at + 1) * each] for at, row in enumerate(rows)}
                thought |= {row: heard[at * n : (at + 1) * n] for at, row in enumerate(rows)}
            if thoughts is not None:
                thoughts += [one for row in range(len(samples)) for one in thought[row]]
            return [image for row in range(len(samples)) for image in found[row]]
        wanted = views(self.system, sizes[0] if sizes and sizes[0] else settings.size, scales)
        device, size = self.system.device, settings.batch_size
        null: Condition | None = None
        made: list[Tensor] = []
        for start in range(0, len(samples), size):
            group = Batch(tuple(samples[start : start + size])).to(device)
            places = range(start, start + len(group)) if positions is None else positions[start : start + size]
            jobs = [(row, key(seed, places[row], k)) for row in range(len(group)) for k in range(n)]
            if settings.think:  # each image has a thought, and so a condition, of its own
                group, heard = self._think(group.take([row for row, _ in jobs]), [of for _, of in jobs], settings)
                if thoughts is not None:
                    thoughts += heard
                jobs = [(row, of) for row, (_, of) in enumerate(jobs)]
            names, factors = plan(settings.guidance, settings.cfg, settings.image_cfg, edits=bool(group.rows("edit")))
            if null is None and "null" in names:
                null = self.system.encode(self._without(group.take([0]), "text_and_images", settings.negative))
            seen: dict[str, Condition] = {"full": self.system.encode(group)}
            if null is not None:
                seen["null"] = null.take([0] * len(group))
            if "image" in names:
                seen["image"] = self.system.encode(self._without(group, "text", settings.negative))
            if "text" in names:
                seen["text"] = self.system.encode(self.system.without(group, "images"))
            branches = [seen[name] for name in names]
            for block in (jobs[at : at + size] for at in range(0, len(jobs), size)):
                rows = [row for row, _ in block]
                chosen = [branch.take(rows) for branch in branches]
                draws = Draws([of for _, of in block], device)
                drawn = [self._draw(view, chosen, factors, draws, settings) for view in wanted]
                made += [images[row] for row in range(len(block)) for images in drawn]
                if progress is not None:
                    progress(len(made), len(samples) * n * len(wanted))
        return made

    def _draw(
        self, view: View, branches: Sequence[Condition], factors: Sequence[float], draws: Draws, settings: Sampling
    ) -> Tensor:
        """Images (B, 3, H, W) of one scale on the CPU."""
        steps = times(settings.steps, shift_at(settings.shift, view.shape[1] * view.shape[2] // 4))
        within = ALWAYS if settings.cfg_range == ALWAYS else span(steps, settings.cfg_range)
        shown = [view.of(branch) for branch in branches]
        if settings.guidance == "bagel":
            velocity = nested(self.system, shown[0], shown[1:], nested_rule(settings))
        else:
            velocity = guided(self.system, shown, factors, within)
        latents = sample(velocity, draws.normal(view.noise, *view.shape), steps, settings.method)
        return self.system.to_images(latents).clamp(-1, 1).float().cpu()

    def _settings(self, options: dict[str, Any], *, edits: bool = False) -> Sampling:
        names = [field.name for field in fields(Sampling)]
        for name in options:
            if name not in names:
                raise unknown("option", name, names)
        if isinstance(side := options.get("size"), int):
            options = {**options, "size": (side, side)}
        own = self.sampling.edit if edits else {}
        return replace(self.sampling, **{**own, **options})

    def _size(self, sample: Sample, settings: Sampling, given: bool) -> tuple[int, int]:
        """(height, width) of the image that a request asks for."""
        if sample.size is not None:
            return sample.size
        follows = isinstance(self.system, ImageSized) and "size" not in self.sampling.edit and not given
        if follows and sample.task == "edit" and sample.context_images:
            assert isinstance(self.system, ImageSized)
            height, width = sample.context_images[0].shape[-2:]
            return self.system.edit_size(height, width)
        return settings.size

    def _think(self, batch: Batch, keys: Sequence[int], settings: Sampling) -> tuple[Batch, list[str]]:
        """Requests with their thoughts, drawn by these keys; and the thoughts."""
        if not settings.think_temperature:
            return self._thinker().think(batch, settings.think)
        uniform = Draws(keys, self.system.device).uniform("thought", settings.think + 1)
        return self._thinker().think(batch, settings.think, drawn(settings.think_temperature, uniform))

    def _thinker(self) -> Thinker:
        if not isinstance(self.system, Thinker) or not self.system.thinks:
            raise UserError(f"{self.name}: this model has no thinking mode; leave think at 0")
        return self.system

    def _reasoner(self) -> Reasoner:
        if not isinstance(self.system, Reasoner):
            raise UserError(f"{self.name}: this model has no thinking mode for questions; leave think off")
        return self.system

    def _without(self, batch: Batch, dropped: Dropped, negative: str) -> Batch:
        """What guidance compares with: the request without its text, or with the negative text in its place."""
        bare = self.system.without(batch, dropped)
        return Batch(tuple(replace(sample, text=negative) for sample in bare)) if negative else bare


Progress = Callable[[int, int], None]
"""Told (images made, images asked for)."""


def later(progress: Progress, before: int, own: int, requests: int) -> Progress:
    """Progress of `own` requests of all `requests`, of which `before` are done."""

    def told(done: int, of: int) -> None:
        progress(done + before * of // own, requests * of // own)

    return told


def flat(images: Sequence[Image.Image | Sequence[Image.Image]]) -> list[Image.Image]:
    """Images of a sequence whose entries are images, or sequences of them."""
    return [one for entry in images for one in ([entry] if isinstance(entry, Image.Image) else entry)]


def nested_rule(settings: Sampling) -> Nested:
    """Guidance "bagel" as these settings say."""
    return Nested(
        text=settings.cfg,
        images=settings.image_cfg,
        interval=settings.cfg_interval,
        renorm=settings.renorm,
        least=settings.renorm_min,
    )


def shift_at(shift: float | Literal["root", "flux"], tokens: int) -> float:
    """The shift of the times for an image of this many tokens of 2x2 latent pixels."""
    if shift == "root":
        return root_shift(tokens)
    return resolution_shift(tokens) if shift == "flux" else shift


def to_pil(image: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] to an 8-bit RGB picture."""
    levels = ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())


def from_pil(image: Image.Image) -> Tensor:
    """A picture to (3, H, W) float32 in [-1, 1]."""
    levels = torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32).copy())
    return levels.permute(2, 0, 1) / 127.5 - 1
