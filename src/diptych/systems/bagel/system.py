"""BAGEL (Deng et al. 2025, arXiv 2505.14683): one language model of two experts understands, generates and edits.

    texts, images (vision tokens, clean latents), noisy latents -> one packed row -> scores of tokens, velocities

A request is read once into keys and values; noisy latents then attend to them at every step. Deviations from the
published code: images are encoded together with others of their size (there all of a row are padded to one size, which
touches the smaller ones), and as the posterior's mode (there a sample).

B batch, C latent channels, h and w latent sides, N latent tokens of an image, c numbers in a latent token.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from diptych.checkpoints.tensors import own_tensors, write_tensors
from diptych.core.condition import Condition
from diptych.core.draws import Draws
from diptych.core.errors import UserError
from diptych.core.host import rows_of, upload
from diptych.core.packing import rows_within
from diptych.core.patchify import patchify, unpatchify
from diptych.core.positions import grid_ids, stretched_ids
from diptych.core.prepared import PreparedBatch
from diptych.core.sample import Batch, Message, Sample
from diptych.core.tokens import NextToken, likeliest
from diptych.parts.autoencoders.base import Autoencoder
from diptych.parts.backbones.mot import MoT
from diptych.systems.bagel.answer import write
from diptych.systems.bagel.config import BagelConfig, Wording, owners, token_sums
from diptych.systems.bagel.context import CacheCondition, ContextStore, Piece, condition, read
from diptych.systems.bagel.examples import Example, Reader, encode_by_shape, find_markers, split
from diptych.systems.bagel.items import Markers, Text, pack
from diptych.systems.bagel.network import BagelNetwork, States
from diptych.systems.bagel.prepare import BagelPreparer
from diptych.systems.base import AssembledSystem, formats, with_adapters_apart
from diptych.systems.conversation import expand_captions
from diptych.systems.grids import LatentGrid
from diptych.systems.presets import Dropped


class BagelSystem(AssembledSystem):
    """See the module's docstring. `origins` holds the configuration of `network` and `autoencoder`."""

    kind = "bagel"
    edit_follows = "last"
    tasks = ("text_to_image", "edit", "understand")
    runs_every_unit: ClassVar[bool] = True  # both experts run in each packed row, be it without tokens
    components = ("network", "autoencoder")

    def __init__(
        self,
        config: BagelConfig,
        *,
        network: BagelNetwork,
        autoencoder: Autoencoder,
        tokenizer: PreTrainedTokenizerBase | None,
        origins: dict[str, Any],
    ) -> None:
        """`tokenizer` may be None on the meta device, where nothing is read."""
        super().__init__()
        if autoencoder.channels != network.config.latent_channels:
            raise UserError(
                f"the network takes {network.config.latent_channels} latent channels, "
                f"the autoencoder gives {autoencoder.channels}"
            )
        if tokenizer is not None and len(tokenizer) > network.config.llm.vocab_size:
            raise UserError(f"tokenizer has {len(tokenizer)} tokens, but vocab_size is {network.config.llm.vocab_size}")
        self.settings: BagelConfig = config
        self.network = network
        self.autoencoder = autoencoder
        self.tokenizer = tokenizer
        self.origins = origins
        self.store = ContextStore(config.cache_tokens)
        self._markers: tuple[Wording, Markers] | None = None

    @property
    def token_side(self) -> int:
        return self.network.config.latent_patch

    @property
    def grid(self) -> LatentGrid:
        config = self.network.config
        return LatentGrid(
            channels=self.autoencoder.channels,
            factor=self.autoencoder.factor,
            patch=self.token_side,
            longest=None if config.stretched else config.latent_side * self.token_side,
        )

    def edit_size(self, height: int, width: int) -> tuple[int, int]:
        """That of the image as the autoencoder reads it, as the released inferencer does: 512 to 1,024 pixels a side.
        Of several images the last decides, as there."""
        return self.settings.latent_size.fit(height, width, self.image_step)

    @property
    def decoder(self) -> MoT:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What may recompute its activations in the backward pass."""
        return self.network.llm

    @property
    def reader(self) -> Reader:
        """Texts and images as tokens."""
        assert self.tokenizer is not None, "a system on the meta device reads nothing"
        wording = self.settings.wording
        if self._markers is None or self._markers[0] != wording:
            self._markers = (wording, find_markers(self.tokenizer, wording))
        return Reader(self.tokenizer, self._markers[1], self.network.config, self.image_step)

    # Requests

    def preparer(self) -> BagelPreparer:
        return BagelPreparer(self.reader, self.settings, self.tasks)

    def encode(self, batch: Batch, draws: Draws | None = None) -> CacheCondition:
        reader = self.reader
        requests = self._pieces(batch.samples)
        if draws is not None:
            requests = [self._dropped(pieces, draws.take([row])) for row, pieces in enumerate(requests)]
        if torch.is_grad_enabled() or draws is not None:
            contexts = self.store.fresh(self.network, len(requests))
            return condition(read(self.network, reader.markers, contexts, requests))
        self.store.limit = self.settings.cache_tokens
        return condition(self.store.contexts(self.network, reader.markers, requests))

    def without(self, batch: Batch, dropped: Dropped) -> Batch:
        def strip(sample: Sample) -> Sample:
            system = tuple(message for message in sample.messages if message.role == "system")
            if dropped == "text":
                return replace(sample, text="", messages=system)
            if dropped == "images":
                # Texts between images stay texts of their own: all but the last are put before it.
                *first, last = [part for part in split(sample.text) if part is not None] or [""]
                before = tuple(Message(role="system", text=part) for part in first)
                return replace(sample, task="text_to_image", text=last, context_images=(), messages=(*system, *before))
            return replace(sample, task="text_to_image", text="", context_images=(), messages=())

        return Batch(tuple(strip(sample) for sample in batch))

    def _pieces(self, samples: Sequence[Sample]) -> list[list[Piece]]:
        """Pieces of requests for an image."""
        for sample in samples:
            if sample.task == "edit" and not sample.context_images:
                raise UserError(f"{sample.id}: task 'edit' needs an image to edit")
        reader = self.reader
        requests, names = [reader.request(sample) for sample in samples], [sample.id for sample in samples]
        return reader.pieces(requests, self.settings, draw=True, where=names, encode=self.to_latents)

    def _dropped(self, pieces: Sequence[Piece], draws: Draws) -> list[Piece]:
        """Pieces of a request with the drops of training; a dropped image's rotary id is not kept here."""
        settings = self.settings
        chances = {
            "text": settings.cfg_dropout_text,
            "vision": settings.cfg_dropout_vit,
            "latent": settings.cfg_dropout_vae,
        }
        drawn = draws.uniform("drop", len(pieces))[0].tolist()
        return [x for x, u in zip(pieces, drawn, strict=True) if u >= chances[x.key.split()[0]]]

    def velocity(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        assert isinstance(condition, CacheCondition)
        patch, config = self.token_side, self.network.config
        rows, columns = x.shape[2] // patch, x.shape[3] // patch
        places = stretched_ids if config.stretched else grid_ids
        output = self.network.query(
            patchify(x, patch, "pqc"),
            t,
            places(rows, columns, config.latent_side),
            condition.starts,
            self.reader.markers,
            condition.layers,
            condition.lengths,
        )
        output = unpatchify(output.to(x.dtype), patch, "pqc", rows, columns)
        return self.settings.flow.to_velocity(output, x, t)

    def generate_text(
        self,
        conversations: Sequence[Sequence[Message]],
        images: Sequence[Sequence[Tensor]],
        *,
        max_new_tokens: int = 64,
        choose: NextToken = likeliest,
    ) -> list[str]:
        reader = self.reader
        names = [f"conversation {number}" for number in range(len(conversations))]
        parts = [
            reader.conversation(messages, pictures, name)
            for messages, pictures, name in zip(conversations, images, names, strict=True)
        ]
        requests = reader.pieces(parts, self.settings, draw=False, where=names, encode=self.to_latents)
        return self._write(requests, max_new_tokens, choose)

    @torch.no_grad()
    def _write(self, requests: Sequence[Sequence[Piece]], max_tokens: int, choose: NextToken) -> list[str]:
        assert self.tokenizer is not None
        reader = self.reader
        contexts = self.store.contexts(self.network, reader.markers, requests)
        room = self.network.config.llm.max_position_embeddings - max(context.position for context in contexts)
        if room < 1:
            raise UserError(
                f"a conversation leaves no room to answer in {room + max(c.position for c in contexts)} tokens"
            )
        ends, limit = {reader.markers.eos}, min(max_tokens + 1, room)
        written = write(self.network, reader.markers, contexts, max_tokens=limit, ends=ends, choose=choose)
        fed = [row[1:] for row in written.fed]
        return [str(self.tokenizer.decode(row, skip_special_tokens=True)).strip() for row in fed]

    def reasoning(self, conversation: Sequence[Message]) -> list[Message]:
        return [Message(role="system", text=self.settings.wording.think_answer), *conversation]

    @property
    def reasons(self) -> bool:
        return True

    @property
    def expands(self) -> bool:
        return True

    def expand(self, batch: Batch, max_tokens: int, choose: NextToken = likeliest) -> tuple[Batch, list[str]]:
        wording = self.settings.wording.think_image
        if "{text}" in wording:

            def answer(asked: Sequence[Sequence[Message]]) -> list[str]:
                return self.generate_text(asked, [[] for _ in asked], max_new_tokens=max_tokens, choose=choose)

            return expand_captions(batch, wording, answer)
        plan = Message(role="system", text=wording)
        asked = [replace(sample, messages=(plan, *sample.messages)) for sample in batch]
        thoughts = self._write(self._pieces(asked), max_tokens, choose)
        requests = tuple(
            replace(sample, messages=(*sample.messages, Message(role="assistant", text=thought)))
            for sample, thought in zip(asked, thoughts, strict=True)
        )
        return Batch(requests), thoughts

    # Training

    def losses(self, batch: PreparedBatch, draws: Draws) -> dict[str, Tensor]:
        examples: Sequence[Example] = batch.inputs
        latents = self._latents(examples)
        rows = self._rows(batch)
        # Sums over each sample's tokens of squared errors and of cross-entropies, and of their weights.
        sums = torch.zeros(4, len(batch), device=self.device)
        states: list[States] = []
        for row in rows:
            run, values = self._row([examples[i] for i in row], [latents[i] for i in row], draws.take(row))
            sums = sums.index_add(1, upload(torch.tensor(row), self.device), values)
            states.append(run)
        flow, flow_weight, text, text_weight = sums
        terms: dict[str, Tensor] = {}
        for task in ("text_to_image", "edit"):
            if drawn := batch.rows(task):
                count = rows_of(flow_weight, drawn)
                terms[f"flow.{task}"] = rows_of(flow, drawn) / torch.where(count > 0, count, 1.0)
        if answered := batch.rows("understand"):
            terms["cross_entropy.understand"] = rows_of(text, answered) / rows_of(text_weight, answered).clamp_min(1)
        if batch.passes:  # sharded: gradients of zeros, not none, for what no loss of this process depends on
            states += [self._empty_row() for _ in range(len(rows), batch.passes)]
            first = next(iter(terms))
            terms[first] = terms[first] + torch.stack([run.zero() for run in states]).sum()
        return terms

    def passes(self, batch: PreparedBatch) -> int:
        return len(self._rows(batch))

    def _rows(self, batch: PreparedBatch) -> list[list[int]]:
        """The samples of each packed row."""
        return rows_within([example.cost for example in batch.inputs], self.settings.row_tokens)

    def _empty_row(self) -> States:
        """All that a packed row runs, of a row that holds nothing: a sharded process runs it while others run a row of
        samples."""
        row = pack([[Text(ids=())]], self.reader.markers, self.network.sides())
        return self.network.run(row, None, None, None, kernel=self.settings.attention)

    def _latents(self, examples: Sequence[Example]) -> list[list[Tensor]]:
        """Clean latent tokens (n, c) of each example's latent items; images are encoded in batches by shape."""
        pixels = [
            image.to(self.device)
            for example in examples
            for image, encoded in zip(example.images, example.is_latent, strict=True)
            if not encoded
        ]
        made = iter(encode_by_shape(pixels, self.to_latents))
        tokens = self.reader.tokens
        return [
            [
                tokens(image.to(self.device) if encoded else next(made))[0]
                for image, encoded in zip(example.images, example.is_latent, strict=True)
            ]
            for example in examples
        ]

    def _row(
        self, examples: Sequence[Example], tokens: Sequence[Sequence[Tensor]], draws: Draws
    ) -> tuple[States, Tensor]:
        """A packed row: its last states, and (4, samples) sums and weights of each sample's squared errors, then of its
        cross-entropies.

        Args:
            tokens: clean latent tokens (n, c) of each example's latent items; the last are those of its target.
        """
        network, settings, device = self.network, self.settings, self.device
        row = pack([example.items for example in examples], self.reader.markers, network.sides())

        # Noisy latents. A target has a time and noise of its own; images that are read have time 0 and no noise.
        items = [(n, x, place + 1 == len(images)) for n, images in enumerate(tokens) for place, x in enumerate(images)]
        latents = noise = times = noisy = of_token = None
        if items:
            drawn = [number for number, x in enumerate(tokens) if x]
            on_cpu = Draws(draws.take(drawn).keys)  # the host finds the distinct times
            of_token = row.token_times(settings.flow.times(on_cpu, [len(tokens[number][-1]) for number in drawn]))
            times = upload(of_token, device)  # (N,)
            latents = torch.cat([x for _, x, _ in items]).to(device)  # (N, c)
            noise = torch.cat(
                [
                    draws.take([number]).normal("noise", *x.shape)[0].to(x) if is_target else torch.zeros_like(x)
                    for number, x, is_target in items
                ]
            ).to(device)
            noisy = (1 - times[:, None]) * latents + times[:, None] * noise

        # Both experts over the whole row.
        patches = [x for example in examples for x in example.patches]
        states = network.run(row, torch.cat(patches) if patches else None, noisy, of_token, kernel=settings.attention)

        # Squared velocity error of each token to denoise, the mean over its channels.
        flow = flow_weight = text = text_weight = torch.zeros(len(examples), device=device)
        if latents is not None and noise is not None and times is not None and noisy is not None:
            places = upload(torch.searchsorted(row.latent_places, row.flow_places), device)
            output = network.port.leave(states.latent[places]).float()[..., None]  # (n, c, 1): a token is an image
            data, noise, noisy, t = (x[places].float() for x in (latents, noise, noisy, times))
            weights = None
            if any(example.weights is not None for example in examples):  # of loss masks, (n, c, 1)
                every = [
                    torch.ones_like(images[-1]) if example.weights is None else example.weights
                    for example, images in zip(examples, tokens, strict=True)
                    if example.items[-1].noised
                ]
                weights = torch.cat(every)[..., None]
            errors = settings.flow.loss(output, data[..., None], noise[..., None], noisy[..., None], t, weights)
            counts = torch.ones_like(errors) if weights is None else weights.mean((1, 2))  # elements of each token
            owner = upload(owners(row.flow_places, row.samples), device)
            flow = token_sums(errors * counts, owner, len(examples))
            flow_weight = token_sums(counts, owner, len(examples))

        # Cross-entropy of each token to learn.
        if len(row.labels):
            places = upload(torch.searchsorted(row.text_places, row.learned_places), device)
            logits = network.llm.lm_head(states.text[places]).float()  # (E, V)
            losses = F.cross_entropy(logits, upload(row.labels, device), reduction="none")
            owner = upload(owners(row.learned_places, row.samples), device)
            weights = upload(row.label_weights, device) if settings.mean == "root" else torch.ones_like(losses)
            text = token_sums(losses * weights, owner, len(examples))
            text_weight = token_sums(weights, owner, len(examples))
        return states, torch.stack([flow, flow_weight, text, text_weight])

    # Structure

    def named_parts(self) -> dict[str, nn.Module]:
        network = self.network
        parts: dict[str, nn.Module] = {
            "llm": network.llm.und_modules(),
            "decoder": nn.ModuleList([network.llm.gen_modules(), network.port]),
            "vision": network.vision,
            "connector": network.connector,
            "autoencoder": self.autoencoder,
        }
        return with_adapters_apart({name: part for name, part in parts.items() if any(True for _ in part.parameters())})

    def shard_units(self) -> Iterable[nn.Module]:
        return [*self.network.llm.layers, *self.network.vision.layers]

    def save_pretrained(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        (folder / "config.json").write_text(json.dumps({**self.config(), "dtype": formats(self, dtype)}, indent=1))
        write_tensors(folder, ((k, v) for k, v in own_tensors(self).items() if self.stores(k)), dtype=dtype)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(str(folder))
