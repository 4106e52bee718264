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
from diptych.systems.bagel.items import Markers, Pack, Text, pack
from diptych.systems.bagel.network import BagelNetwork, States
from diptych.systems.bagel.prepare import BagelPreparer
from diptych.systems.base import AssembledSystem, formats, with_adapters_apart
from diptych.systems.conversation import expand_captions
from diptych.systems.preparing import LatentGrid
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
        return self._answer(conversations, images, max_new_tokens, choose)

    def _answer(
        self,
        conversations: Sequence[Sequence[Message]],
        images: Sequence[Sequence[Tensor]],
        most: int,
        choose: NextToken = likeliest,
    ) -> list[str]:
        reader = self.reader
        names = [f"conversation {number}" for number in range(len(conversations))]
        parts = [
            reader.conversation(messages, pictures, name)
            for messages, pictures, name in zip(conversations, images, names, strict=True)
        ]
        requests = reader.pieces(parts, self.settings, draw=False, where=names, encode=self.to_latents)
        return self._write(requests, most, choose)

    @torch.no_grad()
    def _write(self, requests: Sequence[Sequence[Piece]], most: int, choose: NextToken = likeliest) -> list[str]:
        assert self.tokenizer is not None
        reader = self.reader
        contexts = self.store.contexts(self.network, reader.markers, requests)
        room = self.network.config.llm.max_position_embeddings - max(context.position for context in contexts)
        if room < 1:
            raise UserError(
                f"a conversation leaves no room to answer in {room + max(c.position for c in contexts)} tokens"
            )
        ends, most = {reader.markers.eos}, min(most + 1, room)
        written = write(self.network, reader.markers, contexts, most=most, ends=ends, choose=choose)
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
            return expand_captions(
                batch, wording, lambda asked: self._answer(asked, [[] for _ in asked], max_tokens, choose)
            )
        plan = Message(role="system", text=wording)
        asked = [replace(sample, messages=(plan, *sample.messages)) for sample in batch]
        thoughts = self._write(self._pieces(asked), max_tokens, choose)
        told = tuple(
            replace(sample, messages=(*sample.messages, Message(role="assistant", text=thought)))
            for sample, thought in zip(asked, thoughts, strict=True)
        )
        return Batch(told), thoughts

    # Training

    def losses(self, batch: PreparedBatch, draws: Draws) -> dict[str, Tensor]:
        examples: Sequence[Example] = batch.inputs
        latents = self._latents(examples)
        rows = self._rows(batch)
        flow, flow_weight, told, told_weight = (torch.zeros(len(batch), device=self.device) for _ in range(4))
        zeros: list[Tensor] = []
        for row in rows:
            where = torch.tensor(row, device=self.device)
            sums = self._row([examples[i] for i in row], [latents[i] for i in row], draws.take(row))
            flow = flow.index_add(0, where, sums[0])
            flow_weight = flow_weight.index_add(0, where, sums[1])
            told = told.index_add(0, where, sums[2])
            told_weight = told_weight.index_add(0, where, sums[3])
            zeros.append(sums[4])
        terms: dict[str, Tensor] = {}
        for task in ("text_to_image", "edit"):
            if found := batch.rows(task):
                terms[f"flow.{task}"] = flow[found] / flow_weight[found].clamp_min(1)
        if asked := batch.rows("understand"):
            terms["cross_entropy.understand"] = told[asked] / told_weight[asked].clamp_min(1)
        if batch.passes:  # sharded: gradients of zeros, not none, for what no loss of this process depends on
            zeros += [self._empty_row() for _ in range(len(rows), batch.passes)]
            first = next(iter(terms))
            terms[first] = terms[first] + torch.stack(zeros).sum()
        return terms

    def passes(self, batch: PreparedBatch) -> int:
        return len(self._rows(batch))

    def _rows(self, batch: PreparedBatch) -> list[list[int]]:
        """The samples of each packed row."""
        return rows_within([example.cost for example in batch.inputs], self.settings.row_tokens)

    def _empty_row(self) -> Tensor:
        """A zero that depends on all that a packed row runs, of a row that holds nothing: a sharded process runs it
        while others run a row of samples."""
        row = pack([[Text(ids=())]], self.reader.markers, self.network.sides())
        return self.network.run(row, None, None, None, kernel=self.settings.attention).zero()

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
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Sums and weights of squared errors and of cross-entropies of a packed row, each (samples,); `States.zero`.

        Args:
            tokens: clean latent tokens (n, c) of each example's latent items; the last are those of its target.
        """
        network, settings = self.network, self.settings
        row = pack(
            [example.items for example in examples],
            self.reader.markers,
            network.sides(),
        )
        patches = [x for example in examples for x in example.patches]
        clean = [x for latents in tokens for x in latents]
        latents = noise = times = noisy = None
        if clean:
            latents = torch.cat(clean).to(self.device)  # (N, c)
            noise = torch.cat(self._noise(tokens, draws)).to(self.device)
            times = row.token_times(self._times(tokens, draws))  # (N,)
            noisy = (1 - times[:, None]) * latents + times[:, None] * noise
        states = network.run(row, torch.cat(patches) if patches else None, noisy, times, kernel=settings.attention)
        flow, flow_weight = (torch.zeros(len(examples), device=self.device) for _ in range(2))
        if latents is not None and noise is not None and times is not None and noisy is not None:
            found = torch.searchsorted(row.latent_places, row.flow_places).to(self.device)
            errors = self._flow_errors(states, found, latents, noise, noisy, times)
            owner = owners(row.flow_places, row.samples).to(self.device)
            flow = token_sums(errors, owner, len(examples))
            flow_weight = token_sums(torch.ones_like(errors), owner, len(examples))
        told, told_weight = self._told(row, states, len(examples))
        return flow, flow_weight, told, told_weight, states.zero()

    def _flow_errors(
        self, states: States, found: Tensor, latents: Tensor, noise: Tensor, noisy: Tensor, times: Tensor
    ) -> Tensor:
        """Squared velocity error of each token to denoise, mean over its channels, (tokens,) in float32."""
        output = self.network.port.leave(states.latent[found]).float()[..., None]  # (n, c, 1): a token is an image
        data, noise, noisy, t = (x[found].float() for x in (latents, noise, noisy, times))
        return self.settings.flow.loss(output, data[..., None], noise[..., None], noisy[..., None], t)

    def _told(self, row: Pack, states: States, count: int) -> tuple[Tensor, Tensor]:
        """Sums and weights of the cross-entropies of a row, each (samples,)."""
        if len(row.labels) == 0:
            zero = torch.zeros(count, device=self.device)
            return zero, zero
        found = torch.searchsorted(row.text_places, row.learned_places).to(self.device)
        logits = self.network.llm.lm_head(states.text[found]).float()  # (E, V)
        losses = F.cross_entropy(logits, row.labels.to(self.device), reduction="none")
        owner = owners(row.learned_places, row.samples).to(self.device)
        weights = row.label_weights.to(self.device) if self.settings.mean == "root" else torch.ones_like(losses)
        return token_sums(losses * weights, owner, count), token_sums(weights, owner, count)

    def _noise(self, tokens: Sequence[Sequence[Tensor]], draws: Draws) -> list[Tensor]:
        """Noise of every latent item, (n, c) each; zeros where an image is read."""
        noise: list[Tensor] = []
        for number, latents in enumerate(tokens):
            for place, latent in enumerate(latents):
                if place == len(latents) - 1:  # the target
                    noise.append(draws.take([number]).normal("noise", *latent.shape)[0].to(latent))
                else:
                    noise.append(torch.zeros_like(latent))
        return noise

    def _times(self, tokens: Sequence[Sequence[Tensor]], draws: Draws) -> Tensor:
        """A time for each sample with a target, in order."""
        rows = [number for number, latents in enumerate(tokens) if latents]
        counts = [len(tokens[row][-1]) for row in rows]
        return self.settings.flow.times(draws.take(rows), counts).to(self.device)

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
