"""diffusers models from a configuration or from published safetensors, with errors that name the culprit."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from diffusers.models.modeling_utils import ModelMixin

from diptych.checkpoints.deferred import active, to_be_loaded
from diptych.checkpoints.scaled import scale_hint
from diptych.checkpoints.streaming import stream
from diptych.checkpoints.tensors import load_into, weight_files
from diptych.core.errors import UserError, is_off, unknown

log = logging.getLogger(__name__)

STEM = "diffusion_pytorch_model"
"""In the names of diffusers' files of weights."""

Model = TypeVar("Model", bound=ModelMixin)


def build(architecture: type[Model], config: Mapping[str, Any]) -> Model:
    """The model of this configuration with diffusers' own random initialisation; works under `torch.device("meta")`.

    Args:
        architecture: a diffusers model class.
        config: its arguments, as in its published config.json; names that begin with "_" are skipped.

    Raises:
        UserError: a key the architecture does not have and that asks for something, or values it refuses.
    """
    given = {key: value for key, value in config.items() if not key.startswith("_")}
    known = [name for name in inspect.signature(architecture.__init__).parameters if name != "self"]
    off = [key for key, value in given.items() if key not in known and is_off(value)]
    if off:
        log.info("%s: not known here, and off: %s", architecture.__name__, ", ".join(off))
    for key in off:
        del given[key]
    for key in given:
        if key not in known:
            raise unknown("key", key, known, where=architecture.__name__)
    try:
        return architecture(**given)
    except (TypeError, ValueError) as error:
        raise UserError(f"{architecture.__name__}: {one_line(error)}") from error


def load(
    architecture: type[Model],
    source: str | Path,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
) -> Model:
    """The model in a folder or hub repository of diffusers' layout (config.json, safetensors in one file or shards).

    Args:
        architecture: a diffusers model class.
        source: folder, or hub id such as "Efficient-Large-Model/Sana_1600M_512px_diffusers".
        subfolder: where in it the model lies ("transformer", "vae").
        revision: branch, tag or commit, hub only.
        dtype: what the weights become; float32 when None.

    Raises:
        UserError: unreachable or unknown source, no such model there, pickled weights only, missing, unexpected or
            wrongly shaped keys.
    """
    # A folder that holds no such model is refused before diffusers is asked.
    where = f"{source}/{subfolder}" if subfolder else str(source)
    if Path(source).exists() and not (Path(source) / (subfolder or "") / "config.json").is_file():
        raise UserError(f"{where}: no model here (no config.json)")
    folder = Path(source) / (subfolder or "")
    if any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors")):
        raise UserError(f"{where}: pickled weights (*.bin) are not read; convert them to safetensors")
    # A sharded start builds without memory and reads its own shards later.
    if active() is not None and folder.is_dir():
        return _deferred(architecture, folder, dtype or torch.float32)
    try:
        with quiet_diffusers():
            loaded = architecture.from_pretrained(
                str(source),
                subfolder=subfolder,
                revision=revision,
                torch_dtype=dtype or torch.float32,
                use_safetensors=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, NotImplementedError) as error:
        # NotImplementedError: torch's word for a parameter that no file filled
        hint = "" if Path(source).exists() else " (check the name, and the connection to the hub)"
        raise UserError(f"{where}: cannot load {architecture.__name__}{hint}: {one_line(error)}") from error

    # Every key of the file is in the model, and the reverse.
    model, report = cast(tuple[Model, dict[str, Any]], loaded)
    for problem in ("missing", "unexpected"):
        keys = sorted(report[f"{problem}_keys"])
        if keys:
            shown = ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
            hint = scale_hint(keys) if problem == "unexpected" else ""
            raise UserError(f"{where}: {problem} keys for {architecture.__name__}: {shown}{hint}")
    return model


def _deferred(architecture: type[Model], folder: Path, dtype: torch.dtype) -> Model:
    """A model whose weights are read later (`checkpoints.deferred`)."""
    with to_be_loaded(), quiet_diffusers():
        made: Any = architecture.from_config(architecture.load_config(str(folder)))  # pyright: ignore[reportAttributeAccessIssue]
        model = made.to(dtype).eval()
        tensors = dict(stream(weight_files(folder, STEM)))
        model._fix_state_dict_keys_on_load(tensors)
    load_into(model, iter(tensors.items()), f"{folder}")
    return model


def save(model: ModelMixin, folder: Path) -> None:
    """Write config.json and safetensors that `load` and diffusers read."""
    model.save_pretrained(str(folder), safe_serialization=True)


def one_line(error: Exception) -> str:
    """What an error says, on one line of at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


@contextmanager
def quiet_diffusers() -> Iterator[None]:
    """diffusers' loading messages and warnings off: what matters in them comes as an error here."""
    logger = logging.getLogger("diffusers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
