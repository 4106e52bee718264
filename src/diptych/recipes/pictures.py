"""Sources of proxy tasks from a recipe: which pictures, with which annotations, for which proxies.

```yaml
sources:
  proxies: {kind: proxies, task: edit, path: annotations/panoptic_train2017.json,
            options: {pictures: coco, images: train2017, proxies: {panoptic: 2, weather: 1}}}
  sam_sgt: {kind: proxies, task: edit, path: sam_selection,
            options: {pictures: pairs, targets: sam_mask, proxies: class_agnostic, style: released}}
```

`style` is `paper` or `released` (`data.proxies.tasks`); `colours` chooses a colouring by proxy; `resample` is the
filter of targets that are resized after they were made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from diptych.core.errors import UserError, unknown
from diptych.data.source import Source

PICTURES: Mapping[str, tuple[str, ...]] = {
    "toyworld": (),
    "folder": ("depth",),
    "coco": ("images", "masks", "depth"),
    "sa1b": (),
    "pairs": ("targets", "list"),
}
"""What each kind of pictures reads of `options`, beside `pictures` and `SHARED`."""
SHARED = ("proxies", "style", "colours", "resample")
"""Options of every kind."""
ENDLESS = 10_000_000


def build_proxies(
    name: str, *, path: str | None, count: int, seed: int, task: str, fit: str, options: Mapping[str, Any]
) -> Source:
    """A source of proxy tasks.

    Args:
        path: a folder (folder, sa1b, pairs) or an annotation file (coco); none for the toy world.
        count: of toy scenes, 0 for endless; of other pictures, drawn by `seed`, 0 for all.

    Raises:
        UserError: an option that is unknown, missing or would be ignored, or libraries of the extra `data` missing.
    """
    where = f"sources.{name}"
    try:
        from diptych.data.proxies.coco import CocoPictures, Sa1bPictures
        from diptych.data.proxies.pictures import FolderPictures, PairPictures, SomePictures, ToyPictures
        from diptych.data.proxies.source import ProxySource
    except ModuleNotFoundError as error:
        raise UserError(f"{where}: proxies need {error.name}; install diptych[data]") from error

    kind = str(options.get("pictures"))
    if kind not in PICTURES:
        raise unknown("kind of pictures", kind, PICTURES, f"{where}.options.pictures")
    for option in options:
        if option not in ("pictures", *SHARED, *PICTURES[kind]):
            raise unknown("key", option, ("pictures", *SHARED, *PICTURES[kind]), f"{where}.options")
    if "proxies" not in options:
        raise UserError(f"{where}.options: 'proxies' is missing, a name or weights by name")
    if not isinstance(options["proxies"], str | dict):
        raise UserError(f"{where}.options.proxies: expected a name, or weights by name, not {options['proxies']!r}")
    if fit == "letterbox":
        raise UserError(f"{where}: proxies are cut or stretched to size; set data.fit to crop or stretch, not {fit}")
    how: dict[str, Any] = {option: options[option] for option in SHARED if option in options}
    for option, kinds in (("style", str), ("resample", str), ("colours", dict)):
        if option in how and not isinstance(how[option], kinds):
            raise UserError(f"{where}.options.{option}: expected a {kinds.__name__}, not {how[option]!r}")
    how |= {"seed": seed, "task": task, "name": name, "stretch": fit == "stretch"}
    if kind == "toyworld":
        if path is not None:
            raise UserError(f"{where}: toy scenes are drawn; leave out 'path'")
        return ProxySource(ToyPictures(count=count or ENDLESS, seed=seed), **how)
    if path is None:
        raise UserError(f"{where}: 'path' is missing")
    given = {option: options[option] for option in PICTURES[kind] if option in options}
    if kind == "coco" and "images" not in given:
        raise UserError(f"{where}.options: 'images' is missing, the folder of the pictures")
    if kind == "pairs":
        if "targets" not in given:
            raise UserError(f"{where}.options: 'targets' is missing, the folder of the ready targets")
        given = {"listed" if option == "list" else option: value for option, value in given.items()}
    makers: dict[str, Callable[..., Any]] = {
        "folder": FolderPictures, "coco": CocoPictures, "sa1b": Sa1bPictures, "pairs": PairPictures,
    }  # fmt: skip
    pictures = makers[kind](path, name=name, **given)
    if count:
        pictures = SomePictures(pictures, count, seed=seed, name=where)
    return ProxySource(pictures, **how)
