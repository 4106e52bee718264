"""Batched generation, editing and understanding with any system of the contract."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Concatenate, Literal, ParamSpec, Self, TypeVar, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diptych.checkpoints.tensors import weight_format
from diptych.core.condition import Condition
from diptych.core.draws import Draws
from diptych.core.errors import UserError, unknown
from diptych.core.sample import IMAGE_PLACEHOLDER, Batch, Message, Sample
from diptych.core.tokens import drawn as drawn_token
from diptych.data.imaging import AnyImage, from_pil, image_list, to_pil
from diptych.inference.arguments import check_options, drawn_seeds, seeds, texts, whole
from diptych.inference.caching import cached, threshold_of
from diptych.inference.chat import Chat
from diptych.inference.edit_sizes import edit_size
from diptych.inference.guidance import ALWAYS, Branch, Guidance, guided
from diptych.inference.placement import Placement, cast, check_dtype, device_named, number_format
from diptych.inference.progress import OnDrawingStep, Progress, StepCounter
from diptych.inference.requests import by_size, count_steps, cut, noise_keys
from diptych.inference.sampling import Sampling
from diptych.inference.scales import View, scale_names, views
from diptych.inference.solvers import Solver, span
from diptych.systems.base import System
from diptych.systems.presets import Dropped

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def in_its_format(
    method: Callable[Concatenate[Any, Arguments], Result],
) -> Callable[Concatenate[Any, Arguments], Result]:
    """A method of the engine without gradients, and in the number format that the weights were cast to."""

    @functools.wraps(method)
    def called(self: Any, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        dtype = self.computes_in
        precision = nullcontext() if dtype is None else torch.autocast(self.system.device.type, dtype)
        with torch.no_grad(), precision:
            return method(self, *args, **kwargs)

    return called


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
        self.placement: Placement | None = None  # how it was loaded

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.system.device

    @property
    def dtype(self) -> torch.dtype:
        """The number format of most of its weights."""
        return weight_format(self.system)

    @property
    def computes_in(self) -> torch.dtype | None:
        """The number format of most weights, in which inputs are cast beside them; None for float32."""
        return None if (dtype := weight_format(self.system)) == torch.float32 else dtype

    def __repr__(self) -> str:
        """Its name, system, size, device and how it samples."""
        parameters = list(self.system.parameters())
        count = sum(parameter.numel() for parameter in parameters)
        formats = " and ".join(sorted({str(parameter.dtype).removeprefix("torch.") for parameter in parameters}))
        tasks = ", ".join(self.system.tasks)
        height, width = self.sampling.size
        sampling = f"{height}x{width}, {self.sampling.steps} steps of {self.sampling.solver}, cfg {self.sampling.cfg:g}"
        return (
            f"{type(self).__name__}({self.name!r}: {self.system.kind}, {count / 1e6:,.1f}M parameters in {formats} on "
            f"{self.system.device}; {tasks}; {sampling})"
        )

    def to(
        self, device: str | torch.device | torch.dtype | None = None, dtype: str | torch.dtype | None = None
    ) -> Self:
        """The same model on another device ("auto" for the best there is), or with weights of another number format
        (alone, too: `to(torch.bfloat16)`).

        Raises:
            UserError: a device that is not there, or a format that it does not compute in.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device if dtype is None else dtype
        if self.placement is not None and (self.placement.quantize != "none" or self.placement.offload != "none"):
            raise UserError(
                f"{self.name}: was loaded with {self.placement.words()}; load it again to place it otherwise"
            )
        if dtype is not None:
            wanted = number_format(dtype)
            check_dtype(str(device or self.system.device), wanted)
            cast(self.system, wanted)
        if device is not None:
            self.system.to(device_named(str(device)))
        return self

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        n: int = 1,
        seed: int | Sequence[int] = 0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        progress: Progress | None = None,
        on_step: OnDrawingStep | None = None,
        expansions: list[str] | None = None,
        output_type: OutputType = "pil",
        **options: Any,
    ) -> Any:
        """Images for one prompt or several, n each, prompt by prompt.

        A model of several scales makes the last one, or those of `scales` ("all", or names as in "4x4,8x8"), which then
        follow each other, coarse before fine. Other `options` are fields of `Sampling` (`size` may be one number).
        The same (seed, prompt position, image position) gives the same noise for any batch size. A list given as
        `expansions` is extended by the text that the model wrote before each image, where it was asked to.

        Args:
            seed: one for all, or a list of seeds; see `tensors`. generator: draws the seeds of all images instead, or
                a list of generators, each the seed of its image.
            on_step: called after every step, with a preview on demand.
            output_type: a list of pictures ("pil"), of arrays (H, W, 3) uint8 ("np"), or of tensors (3, H, W) in
                [-1, 1] ("pt").
        """
        prompts = texts(prompt, "prompt")
        samples = [Sample(id=f"prompt {i}", task="text_to_image", text=text) for i, text in enumerate(prompts)]
        return self._drawn(samples, n, seed, generator, output_type, progress, on_step, expansions, options)

    def edit(
        self,
        image: AnyImage | Sequence[AnyImage | Sequence[AnyImage]],
        instruction: str | Sequence[str],
        *,
        n: int = 1,
        seed: int | Sequence[int] = 0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        progress: Progress | None = None,
        on_step: OnDrawingStep | None = None,
        output_type: OutputType = "pil",
        **options: Any,
    ) -> Any:
        """Edited images. An image is what `diptych.data.imaging.as_image` takes: a Pillow image, a path, a file's
        bytes, an array or a tensor. One instruction goes with one image, or with several that it refers to; a list of
        instructions goes with a list of as many images (or lists of images). The other arguments are `generate`'s."""
        instructions = texts(instruction, "instruction")
        several = not isinstance(instruction, str) and isinstance(image, Sequence) and not isinstance(image, AnyImage)
        groups = [image_list(entry) for entry in image] if several else [image_list(image)]  # pyright: ignore[reportGeneralTypeIssues]
        if len(groups) != len(instructions):
            raise UserError(f"{len(groups)} images but {len(instructions)} instructions; give one image to each")
        samples = [
            Sample(id=f"edit {i}", task="edit", text=text, context_images=tuple(from_pil(picture) for picture in group))
            for i, (group, text) in enumerate(zip(groups, instructions, strict=True))
        ]
        return self._drawn(samples, n, seed, generator, output_type, progress, on_step, None, options)

    def _drawn(
        self,
        samples: Sequence[Sample],
        n: int,
        seed: int | Sequence[int],
        generator: torch.Generator | Sequence[torch.Generator] | None,
        output_type: OutputType,
        progress: Progress | None,
        on_step: OnDrawingStep | None,
        expansions: list[str] | None,
        options: Mapping[str, Any],
    ) -> list[Any]:
        """Images of requests in the form that the caller wants."""
        if output_type not in get_args(OutputType):
            raise unknown("output_type", output_type, get_args(OutputType))
        check_options(options)
        n = whole(n, "n", minimum=1)
        if generator is not None:
            if seeds(seed) != 0:
                raise UserError("give a seed or a generator, not both")
            seed = drawn_seeds(generator, len(samples) * n)
        reports: dict[str, Any] = {"progress": progress, "on_step": on_step, "expansions": expansions}
        images = self.tensors(samples, n=n, seed=seed, **reports, **options)
        if output_type == "pt":
            return images
        pictures = [to_pil(image) for image in images]
        return pictures if output_type == "pil" else [np.asarray(picture) for picture in pictures]

    @in_its_format
    def ask(
        self,
        image: AnyImage | Sequence[AnyImage] | None,
        question: str | Sequence[str],
        *,
        max_new_tokens: int = 64,
        think: bool = False,
    ) -> str | list[str]:
        """Answers. One question (with one image, several, or none) gives a string; a list of questions goes with a
        list of as many images, one each, and gives a list. With `think`, models that can write down their thoughts
        first."""
        questions, longest = texts(question, "question"), whole(max_new_tokens, "max_new_tokens", minimum=1)
        if isinstance(question, str):
            groups = [[] if image is None else image_list(image)]
        else:
            if image is None or isinstance(image, AnyImage) or len(image) != len(questions):
                raise UserError(f"{len(questions)} questions need as many images")
            groups = [[picture] for picture in image]
        conversations = [
            [Message(role="user", text=f"{IMAGE_PLACEHOLDER}\n" * len(group) + text)]
            for text, group in zip(questions, groups, strict=True)
        ]
        if think:
            conversations = [self._reasoned(conversation) for conversation in conversations]
        device = self.system.device
        tensors = [[from_pil(picture).to(device) for picture in group] for group in groups]
        answers: list[str] = []
        step = self.sampling.batch_size
        for start in range(0, len(questions), step):
            rows = slice(start, start + step)
            answers += self.system.generate_text(conversations[rows], tensors[rows], max_new_tokens=longest)
        return answers[0] if isinstance(question, str) else answers

    def chat(self, *, max_new_tokens: int = 256) -> Chat:
        """A new conversation, which keeps its history: `chat.say("what is this?", image)`, or `chat.stream(...)`."""
        if "understand" not in self.system.tasks:
            raise UserError(f"{self.name}: this model answers no questions")
        return Chat(self.system, max_new_tokens=whole(max_new_tokens, "max_new_tokens", minimum=1))

    @in_its_format
    def tensors(
        self,
        samples: Sequence[Sample],
        *,
        n: int,
        seed: int | Sequence[int],
        scales: str = "last",
        positions: Sequence[int] | None = None,
        progress: Progress | None = None,
        on_step: OnDrawingStep | None = None,
        expansions: list[str] | None = None,
        **options: Any,
    ) -> list[Tensor]:
        """Images (3, H, W) in [-1, 1] for requests, n each, request by request, each at the wanted `scales`.

        The condition of a request is computed once, however many images and scales are drawn from it, and the null
        condition of guidance once for all of a size. A request that says its size has that one; an edit has the shape
        of its image (`inference.edit_sizes`), unless `size` is among the options.

        Args:
            seed: one, from which every image has noise of its own; or a list of one for each image, or for each of
                the n images of a request. An image has the same noise wherever its own seed stands.
            positions: of the requests in a longer list, by which their noise is drawn; their own places when None.
            on_step: called after every step of the solver.
            expansions: extended by the text that the model wrote before each image, where it was asked to.
        """
        n = whole(n, "n", minimum=1)
        # Settings for these requests, and the size of each.
        edits = all(sample.task == "edit" for sample in samples)
        settings = self.settings(options, edits=edits)
        samples = [replace(sample, size=self.image_size(sample, settings, "size" in options)) for sample in samples]
        keys = noise_keys(seed, range(len(samples)) if positions is None else positions, n)
        device, capacity = self.system.device, settings.batch_size
        total = len(samples) * n * len(scale_names(self.system, scales))
        images: list[list[Tensor]] = [[] for _ in samples]
        texts: list[list[str]] = [[] for _ in samples]
        # Requests of one size share batches, guidance's null condition and the schedule of each scale.
        sizes = by_size(samples)
        plans = {
            size: [(view, *self.plan(view, settings)) for view in views(self.system, size, scales)] for size in sizes
        }
        counter = None if on_step is None else StepCounter(on_step, count_steps(sizes, plans, n, capacity))
        for size, rows in sizes.items():
            passes = plans[size]
            null: Condition | None = None
            for group in cut(rows, capacity):
                batch = Batch(tuple(samples[row] for row in group)).to(device)
                # Every image is of a request, by its place in the batch, and has a key for its noise.
                jobs = [(place, keys[row][k]) for place, row in enumerate(group) for k in range(n)]
                owners = [row for row in group for _ in range(n)]
                if settings.prompt_expansion:  # each image is drawn from a text of its own, and so from a condition
                    asked = batch.take([place for place, _ in jobs])
                    batch, written = self._expand(asked, [noise for _, noise in jobs], settings)
                    for row, text in zip(owners, written, strict=True):
                        texts[row].append(text)
                    jobs = [(place, noise) for place, (_, noise) in enumerate(jobs)]
                # The condition of every branch, once for all images and scales of a request.
                branches = passes[0][2].branches(batch)
                if "null" in branches and null is None:
                    null = self.system.encode(self.version("null", batch.take([0]), settings.negative))
                conditions: dict[Branch, Condition] = {}
                for branch in sorted(branches, key=ENCODED.index):
                    conditions[branch] = (
                        null.take([0] * len(batch))
                        if branch == "null" and null is not None
                        else self.system.encode(self.version(branch, batch, settings.negative))
                    )
                # The images, coarse scales before fine ones.
                for block in cut(list(zip(jobs, owners, strict=True)), capacity):
                    chosen = [place for (place, _), _ in block]
                    draws = Draws([noise for (_, noise), _ in block], device)
                    shared = {branch: conditions[branch].take(chosen) for branch in branches}
                    watch = None if counter is None else counter.watch(tuple(row for _, row in block), self._pictures)
                    drawn: list[Tensor] = []
                    for view, solver, guidance in passes:
                        seen: dict[Branch, Condition] = {name: view.of(shared[name]) for name in branches}
                        compared = cached(
                            self.system.branches(list(seen.values())),
                            threshold_of(settings.cache),
                            settings.cache_order,
                        )
                        velocity = guided(compared, list(seen), guidance)
                        latents = solver.solve(velocity, draws.normal(view.noise, *view.shape), watch)
                        drawn.append(self.system.to_images(latents).clamp(-1, 1).float().cpu())  # (B, 3, H, W)
                    for place, (_, row) in enumerate(block):
                        images[row] += [scale[place] for scale in drawn]
                    if progress is not None:
                        progress(sum(len(row) for row in images), total)
        if expansions is not None:
            expansions += [text for row in texts for text in row]
        return [image for row in images for image in row]

    def settings(self, options: Mapping[str, Any], *, edits: bool = False) -> Sampling:
        """The model's own settings (for edits, with those of `edit`), and `options` in their place."""
        defaults = self.sampling.over(self.sampling.edit) if edits else self.sampling
        return defaults.over(options)

    def _pictures(self, latents: Tensor) -> list[Image.Image]:
        """Latents (B, C, h, w) as pictures."""
        return [to_pil(image) for image in self.system.to_images(latents).float().cpu()]

    def plan(self, view: View, settings: Sampling) -> tuple[Solver, Guidance]:
        """The solver that draws a scale, and the guidance at its times."""
        solver = settings.solver_at(view.shape[1] * view.shape[2] // 4)
        during = ALWAYS if settings.cfg_range == ALWAYS else span(solver.times, settings.cfg_range)
        return solver, settings.guide(during, self.system.token_side)

    def version(self, branch: Branch, batch: Batch, negative: str) -> Batch:
        """The requests as a branch of guidance has them; the negative text stands where the text was removed."""
        if branch == "full":
            return batch
        bare = self.system.without(batch, DROPPED[branch])
        if branch == "text" or not negative:
            return bare
        return Batch(tuple(replace(sample, text=negative) for sample in bare))

    def image_size(self, sample: Sample, settings: Sampling, given: bool) -> tuple[int, int]:
        """(height, width) of the image that a request asks for."""
        if sample.size is not None:
            return sample.size
        if sample.task != "edit" or given or "size" in self.sampling.edit:
            return settings.size
        images = [(image.shape[-2], image.shape[-1]) for image in sample.context_images]
        return edit_size(self.system, images, settings.size)

    def _expand(self, batch: Batch, keys: Sequence[int], settings: Sampling) -> tuple[Batch, list[str]]:
        """Requests with what the model writes about each image before it draws it, by these keys; and these texts."""
        system = self.system
        if not system.expands:
            raise UserError(f"{self.name}: this model cannot expand prompts; leave prompt_expansion at 0")
        if not settings.prompt_expansion_temperature:
            return system.expand(batch, settings.prompt_expansion)
        uniform = Draws(keys, system.device).uniform("thought", settings.prompt_expansion + 1)
        choose = drawn_token(settings.prompt_expansion_temperature, uniform)
        return system.expand(batch, settings.prompt_expansion, choose)

    def _reasoned(self, conversation: Sequence[Message]) -> list[Message]:
        """A conversation with the request to reason first."""
        if not self.system.reasons:
            raise UserError(f"{self.name}: this model has no thinking mode for questions; leave think off")
        return self.system.reasoning(conversation)


OutputType = Literal["pil", "np", "pt"]

DROPPED: dict[Branch, Dropped] = {"null": "text_and_images", "image": "text", "text": "images"}
"""What each branch of guidance leaves out of a request."""

ENCODED: tuple[Branch, ...] = ("null", "full", "image", "text")
"""The order in which the branches of guidance are encoded: a cache may continue what another branch read."""
