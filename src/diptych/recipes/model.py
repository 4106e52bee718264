"""A model as its ecosystem expects one: from_pretrained, save_pretrained, push_to_hub, and a card beside it."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]
    LocalTokenNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from diptych.core.errors import UserError
from diptych.inference.engine import Engine
from diptych.inference.placement import (
    Offload,
    Placement,
    Quantization,
    check_dtype,
    device_named,
    number_format,
    place,
)
from diptych.recipes.bases import save_system
from diptych.recipes.fit import fitted, memory
from diptych.recipes.model_card import CARD, model_card
from diptych.recipes.names import model_name, shipped

if TYPE_CHECKING:
    from diptych.recipes.lora import Given

log = logging.getLogger(__name__)


@contextlib.contextmanager
def pushing(repo_id: str) -> Iterator[None]:
    """While the hub is asked: what it refuses as a UserError."""
    try:
        yield
    except HFValidationError as error:
        raise UserError(f"{repo_id!r}: no name of a repository (owner/name)") from error
    except LocalTokenNotFoundError as error:
        raise UserError(f"{repo_id}: the hub wants a token; run `hf auth login`, or set HF_TOKEN") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        hint = "; the token of `hf auth login` may not write there" if status in (401, 403, 404) else ""
        raise UserError(f"{repo_id}: the hub refused (status {status}){hint}") from error
    except (OSError, HTTPError) as error:
        raise UserError(f"{repo_id}: the hub cannot be reached ({type(error).__name__}); check the network") from error


class Model(Engine):
    """An engine that can be saved and shared; `diptych.load` gives one.

    fit: what was chosen to make it fit into a device's memory, and why; empty where nothing was asked for.
    lora: what was added to its weights, with scales.
    """

    fit: str = ""
    lora: Sequence[str] = ()

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype | None = "auto",
        quantize: Quantization = "none",
        offload: Offload = "none",
        tile: int | None = None,
        fit: str | int | None = None,
        lora: Sequence[Given] | Given = (),
    ) -> Self:
        """The model of a name, a run folder, a saved folder or a hub id; arguments as of `diptych.load`."""
        from diptych.recipes.load import load_system

        # What is asked for, refused before anything is read.
        wanted = None if dtype in (None, "auto") else number_format(dtype)
        name = model_name(name)
        place_at = Placement(
            device=device_named(str(device)), dtype=wanted, quantize=quantize, offload=offload, tile=tile
        )
        check_dtype(place_at.device, wanted)
        budget = None if fit is None else memory(fit)
        # The model, and where it goes.
        system, sampling = load_system(name, None if lora or wanted == torch.float16 else wanted)
        model = cls(system, sampling, name)
        if lora:
            from diptych.recipes.lora import add, as_list  # imports every system

            model.lora = add(system, as_list(lora))
        if budget is not None:
            place_at, batch_size, why = fitted(model, place_at, budget)
            model.sampling = dataclasses.replace(sampling, batch_size=batch_size)
            log.info("%s: %s", name, why)
            model.fit = why
        place(system, place_at)
        model.placement = place_at
        return model

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        dtype: str | torch.dtype | None = None,
        data: str = "",
        scores: Mapping[str, float] | None = None,
    ) -> Path:
        """Write the model into a new folder: config.json with the sampling settings, safetensors, assets and a card.

        Parts that still are those of a name are referred to, not written again.

        Args:
            dtype: number format of the weights. data: what it learned from, for the card. scores: by benchmark, too.

        Raises:
            UserError: a folder that exists and is not empty.
        """
        card = self.card(data=data, scores=scores)
        if self.lora:
            raise UserError(f"{self.name}: has LoRA beside its weights ({self.lora[0]}); diptych lora merge saves both")
        if self.placement is not None and self.placement.quantize != "none":
            raise UserError(
                f"{self.name}: was loaded as {self.placement.quantize}; load it without quantize to save it"
            )
        place = Path(folder).expanduser()
        if place.exists() and (not place.is_dir() or any(place.iterdir())):
            raise UserError(f"{place}: exists already; choose another folder")
        if place.exists():
            place.rmdir()
        self.system.keep_sampling(dataclasses.asdict(self.sampling))

        def write_card(temporary: Path) -> None:
            (temporary / CARD).write_text(card, encoding="utf-8")

        place.parent.mkdir(parents=True, exist_ok=True)
        save_system(self.system, place, None if dtype is None else number_format(dtype), write_card)
        return place

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = True,
        message: str = "Diptych model",
        dtype: str | torch.dtype | None = None,
        data: str = "",
        scores: Mapping[str, float] | None = None,
    ) -> str:
        """Upload the model and its card to a hub repository, which is made where there is none; the commit's address.

        The token is the one that `hf auth login` left.

        Raises:
            UserError: a name that no repository can have, or a hub that is not reached or refuses.
        """
        import tempfile

        with pushing(repo_id):
            validate_repo_id(repo_id)
        for component in self.system.components:  # nobody else has the folders of this machine
            name = self.system.origins[component].get("weights")
            if name and name not in shipped() and Path(name).expanduser().is_dir():
                self.system.origins[component] = {**self.system.origins[component], "weights": None}
        with tempfile.TemporaryDirectory() as folder:
            place = self.save_pretrained(Path(folder) / "model", dtype=dtype, data=data, scores=scores)
            api = HfApi()
            with pushing(repo_id):
                made = api.create_repo(repo_id, private=private, exist_ok=True)
                done = api.upload_folder(repo_id=made.repo_id, folder_path=place, commit_message=message)
        return str(done.commit_url)

    def card(self, *, data: str = "", scores: Mapping[str, float] | None = None) -> str:
        """The model card, Markdown with the metadata that the hub reads; what is not given is that of its run."""
        system = self.system
        return model_card(self.name, system.kind, system.tasks, system.origins, self.sampling, data, scores)
