"""safetensors in and out: sharded, atomic, strict. Never a pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from diptych.checkpoints.deferred import active
from diptych.checkpoints.finite import cast
from diptych.checkpoints.scaled import scale_hint
from diptych.core.errors import UserError, nearest
from diptych.core.filenames import member_path
from diptych.core.reading import read_object

PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle")
SHARD_BYTES = 4 * 1024**3
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
WEIGHT_FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Formats that models compute in, by the names that configurations use."""
LORA = ".lora_"
"""In the names of adapters' parameters."""
PROJECTOR = "projector."
"""What names of a system's weights for representation alignment begin with: they are for training alone, and no release
has them."""
FORMATS = {dtype: name for name, dtype in DTYPES.items()}
CHECKSUMS = "xxh3_64"
"""In a file's metadata: a JSON mapping from the names of its tensors to the checksums of their bytes."""


def refuse_pickle(path: Path) -> None:
    """UserError when a file that may hold a pickle is offered as weights."""
    if path.suffix in PICKLES:
        raise UserError(
            f"{path}: pickle files can run code when opened and are not read as weights; "
            "convert it to .safetensors: diptych convert FILE OUT.safetensors reads it in a process of its own"
        )


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; of tied ones only the first name."""
    seen: set[int] = set()
    tensors: dict[str, Tensor] = {}
    state = module.state_dict(keep_vars=True)
    for name, tensor in state.items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor
    return tensors


def released_tensors(system: nn.Module) -> dict[str, Tensor]:
    """`own_tensors` of a system that a release has a place for."""
    return {name: tensor for name, tensor in own_tensors(system).items() if not name.startswith(PROJECTOR)}


def weight_format(module: nn.Module) -> torch.dtype:
    """The number format of most of a module's weights; float32 for a module without any. Quantised weights, whose
    numbers are of another kind, and adapters do not count."""
    counts: dict[torch.dtype, int] = {}
    for name, parameter in module.named_parameters():
        if parameter.dtype in WEIGHT_FORMATS.values() and LORA not in name:
            counts[parameter.dtype] = counts.get(parameter.dtype, 0) + parameter.numel()
    return max(counts, key=lambda dtype: counts[dtype], default=torch.float32)


def widest_format(module: nn.Module) -> torch.dtype:
    """The number format that holds all of a module's weights: float32 where some learned in it beside frozen ones of
    fewer bits. Quantised weights and adapters do not count."""
    formats = {
        p.dtype for name, p in module.named_parameters() if p.dtype in WEIGHT_FORMATS.values() and LORA not in name
    }
    return formats.pop() if len(formats) == 1 else torch.float32


def write_tensors(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    stem: str = "model",
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    metadata: Callable[[Iterable[str]], dict[str, str]] | None = None,
) -> None:
    """Write `stem`.safetensors, or numbered shards with `stem`.safetensors.index.json once one shard is full.

    Tensors are taken one at a time, so that no more than a shard is in host memory. Their checksums, taken before they
    are written, stand in the files' metadata, and with them what `metadata` gives for the names in a file.
    """
    shards: list[tuple[str, list[str]]] = []
    pending: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        nonlocal pending, size
        name = f"{stem}-{len(shards) + 1:05d}.safetensors"
        write_safetensors(folder / name, pending, metadata(pending) if metadata else {})
        shards.append((name, list(pending)))
        pending, size = {}, 0

    # A shard is written once the next tensor would not fit.
    for name, tensor in tensors:
        tensor = cast(name, tensor.detach().to("cpu"), dtype).contiguous()
        if pending and size + tensor.nbytes > shard_bytes:
            flush()
        pending[name] = tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()
    if len(shards) == 1:
        os.replace(folder / shards[0][0], folder / f"{stem}.safetensors")
        return
    # The number of shards is known now, and their names can say it.
    weight_map: dict[str, str] = {}
    for position, (name, keys) in enumerate(shards, start=1):
        final = f"{stem}-{position:05d}-of-{len(shards):05d}.safetensors"
        os.replace(folder / name, folder / final)
        weight_map |= dict.fromkeys(keys, final)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1))


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write one file in the safetensors format, with a checksum of each tensor in its metadata, beside `metadata`.

    The same tensors always give the same bytes; the library's own writer orders the metadata by chance.
    """
    sums = {name: checksum(tensor) for name, tensor in sorted(tensors.items())}
    header: dict[str, Any] = {"__metadata__": {"format": "pt", CHECKSUMS: json.dumps(sums), **(metadata or {})}}
    start = 0
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # large numbers first: all aligned
    for name in order:
        tensor = tensors[name]
        stop = start + tensor.nbytes
        header[name] = {"dtype": FORMATS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in order:
            file.write(raw_bytes(tensors[name]))


def raw_bytes(tensor: Tensor) -> Any:
    """A tensor's bytes, as numpy has them; those of a tensor on the CPU are not copied."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def weight_files(folder: Path, stem: str = "model") -> list[Path]:
    """The safetensors files of a folder: one, or those of the index."""
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        shards = read_object(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise UserError(f"{index}: not an index of safetensors shards (no weight_map)")
        names = sorted(str(member_path(name, str(index))) for name in {*shards.values()})
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise UserError(f"{index}: shard {missing[0]} is missing")
        return [folder / name for name in names]
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        refuse_pickle(path)
    raise UserError(f"{folder}: no {stem}.safetensors here")


def checksum(tensor: Tensor) -> str:
    """XXH3 (64 bits) of a tensor's bytes, in hexadecimal digits."""
    return xxhash.xxh3_64_hexdigest(raw_bytes(tensor))


def read_checksums(path: Path, metadata: Mapping[str, str] | None) -> dict[str, str]:
    """Checksums by tensor, from a file's metadata, if it has any; UserError where they are broken."""
    try:
        sums = json.loads((metadata or {}).get(CHECKSUMS, "{}"))
        return {str(name): str(value) for name, value in sums.items()}
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path}: damaged (its checksums cannot be read)") from error


def read_tensors(files: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    """Tensors of safetensors files one at a time; UserError names an unreadable file, and a tensor whose bytes are not
    those that were written."""
    if active() is not None:
        from diptych.checkpoints.streaming import stream  # which builds on this file

        yield from stream(files)
        return
    for path in files:
        refuse_pickle(path)
        try:
            with safe_open(path, framework="pt") as file:
                sums = read_checksums(path, file.metadata())
                for name in file.keys():  # noqa: SIM118
                    tensor = file.get_tensor(name)
                    if sums.get(name, expected := checksum(tensor) if sums else "") != expected:
                        raise UserError(f"{path}: {name} is damaged: its bytes are not those that were written")
                    yield name, tensor
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: not a readable safetensors file ({error})") from error


def load_into(
    module: nn.Module,
    tensors: Iterable[tuple[str, Tensor]],
    source: str,
    optional: Callable[[str], bool] = lambda name: False,
    rename: Mapping[str, str] | None = None,
) -> None:
    """Copy tensors into a module, strictly.

    Every tensor of the module must come (but for those `optional`), none may be unknown, and every shape must fit;
    otherwise a UserError names the first few. Meta parameters are materialised from the file.
    """
    expected = own_tensors(module)
    first = {id(tensor): name for name, tensor in expected.items()}
    aliases = {name: first[id(tensor)] for name, tensor in module.state_dict(keep_vars=True).items()}
    tied: dict[str, list[str]] = {}
    for name, target in aliases.items():
        tied.setdefault(target, []).append(name)
    seen: set[str] = set()
    unexpected: list[str] = []
    for name, tensor in tensors:
        name = (rename or {}).get(name, name)
        target = aliases.get(name)
        if target is None:
            unexpected.append(name)
            continue
        if expected[target].shape != tensor.shape:
            raise UserError(
                f"{source}: {name} has shape {list(tensor.shape)}, the model needs {list(expected[target].shape)}"
            )
        assign(module, tied[target], tensor)
        seen.add(target)
    missing = [name for name in expected if name not in seen and not optional(name)]
    if missing or unexpected:
        raise UserError(f"{source}: {_difference(missing, unexpected)}{scale_hint(unexpected)}")


def assign(module: nn.Module, names: Sequence[str], tensor: Tensor) -> None:
    """Copy a tensor into the parameter or buffer of these (tied) names, creating it when it is on the meta device."""
    owners = [(module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names]
    current = getattr(*owners[0])
    if not current.is_meta and not tensor.is_meta:
        with torch.no_grad():
            current.copy_(tensor)
        return
    new = tensor.to(current.dtype)
    made = nn.Parameter(new, current.requires_grad) if isinstance(current, nn.Parameter) else new
    for owner, leaf in owners:
        setattr(owner, leaf, made)


def _difference(missing: list[str], unexpected: list[str]) -> str:
    def listed(names: list[str]) -> str:
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

    parts = [f"{len(missing)} missing ({listed(missing)})"] if missing else []
    parts += [f"{len(unexpected)} unexpected ({listed(unexpected)})"] if unexpected else []
    guess = nearest(unexpected[0], missing) if missing and unexpected else None
    return "weights do not fit: " + "; ".join(parts) + (f"; {unexpected[0]} may be {guess}" if guess else "")


def swap_prefix(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    """The name with the first of the prefixes that it begins with exchanged; pairs are (before, after)."""
    for before, after in pairs:
        if name.startswith(before):
            return after + name.removeprefix(before)
    return name
