"""A model as its ecosystem expects one: from_pretrained, save_pretrained, push_to_hub, and a card beside it."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from huggingface_hub import HfApi

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
from diptych.recipes.names import shipped

if TYPE_CHECKING:
    from diptych.recipes.lora import Given

log = logging.getLogger(__name__)

CARD = "README.md"


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
        name: str,
        *,
        device: str = "auto",
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
        place_at = Placement(device=device_named(device), dtype=wanted, quantize=quantize, offload=offload, tile=tile)
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
            (temporary / CARD).write_text(self.card(data=data, scores=scores), encoding="utf-8")

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
        """
        import tempfile

        for component in self.system.components:  # nobody else has the folders of this machine
            name = self.system.origins[component].get("weights")
            if name and name not in shipped() and Path(name).expanduser().is_dir():
                self.system.origins[component] = {**self.system.origins[component], "weights": None}
        with tempfile.TemporaryDirectory() as folder:
            place = self.save_pretrained(Path(folder) / "model", dtype=dtype, data=data, scores=scores)
            api = HfApi()
            api.create_repo(repo_id, private=private, exist_ok=True)
            done = api.upload_folder(repo_id=repo_id, folder_path=place, commit_message=message)
        return str(done.commit_url)

    def card(self, *, data: str = "", scores: Mapping[str, float] | None = None) -> str:
        """The model card, Markdown with the metadata that the hub reads."""
        bases = self.bases()
        head = ["---", "library_name: diptych", "pipeline_tag: any-to-any"]
        if bases:
            head += ["base_model:", *(f"- {base}" for base in bases)]
        head += ["tags:", "- diptych", f"- {self.system.kind}", "---", ""]
        sampling = {name: value for name, value in dataclasses.asdict(self.sampling).items() if value not in ("", {})}
        body = [
            f"# {self.name}",
            "",
            f"A unified multimodal model of kind `{self.system.kind}`: {', '.join(self.system.tasks)}.",
            "",
            "```python",
            "import diptych",
            "",
            'model = diptych.load("OWNER/NAME")  # this repository, or the folder',
            'images = model.generate("a red circle left of a blue square")',
            "```",
            "",
            "## Data",
            "",
            data or "Not stated.",
            "",
            "## Scores",
            "",
            *([f"- {name}: {value:g}" for name, value in scores.items()] if scores else ["Not stated."]),
            "",
            "## Sampling",
            "",
            *(f"- `{name}`: {value}" for name, value in sampling.items()),
            "",
        ]
        return "\n".join(head + body)

    def bases(self) -> list[str]:
        """Hub ids of the models whose weights parts of this one are."""
        origins: dict[str, Any] = getattr(self.system, "origins", {})
        named = [origin.get("weights") for origin in origins.values() if isinstance(origin, dict)]
        hub = [str(name) for name in named if name and str(name).count("/") == 1 and not Path(str(name)).exists()]
        hub = [name.partition("@")[0] for name in hub]
        return [name for name in dict.fromkeys(hub) if not name.startswith(("toy/", ".", "/", "~"))]
