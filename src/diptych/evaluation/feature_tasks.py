"""Benchmarks that compare features: FID on MJHQ-30K, and CLIPScore."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor

from diptych.core.errors import UserError
from diptych.core.files import write_file
from diptych.data.imaging import UNREADABLE
from diptych.evaluation import clipscore, frechet
from diptych.evaluation.clip import Clip, short_side
from diptych.evaluation.geneval_task import ahead, batches, read
from diptych.evaluation.inception import Inception, load_inception
from diptych.evaluation.intervals import Bounds
from diptych.evaluation.judging import failed
from diptych.evaluation.task import Item, Output, PictureTask, Row, Summary, numbered

PICTURES = 256
"""Side to which MJHQ's pictures are brought before FID's network stretches them."""


def square(image: Image.Image, side: int = PICTURES) -> np.ndarray:
    """Bicubic short side, centre crop: (side, side, 3) uint8."""
    image = short_side(image.convert("RGB"), side)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return np.asarray(image.crop((left, top, left + side, top + side)))


def read_square(output: Output) -> np.ndarray | str:
    try:
        with Image.open(output.file) as image:
            return square(image)
    except UNREADABLE as error:
        return f"not a readable picture ({type(error).__name__})"


class MJHQ(PictureTask):
    """FID of 30,000 pictures against MJHQ-30K's own (Li et al. 2024, arXiv 2402.17245); `{category}/{id}.png`.

    A part of the pictures, or a run with some missing, has no FID: the figure depends on their number.
    """

    name: str = "mjhq_fid"
    divisible: ClassVar[bool] = False
    bounds: ClassVar[Bounds] = None
    count: ClassVar[int] = 30_000

    def items(self) -> list[Item]:
        path = self.tools.data.file(self.name, "meta_data.json")
        entries = json.loads(path.read_text(encoding="utf-8"))
        items = [
            Item(
                id=name, prompt=entry["prompt"], category=entry["category"], files=(f"{entry['category']}/{name}.png",)
            )
            for name, entry in entries.items()
        ]
        if len(items) != self.count:
            raise UserError(f"{path}: {len(items)} entries; FID on MJHQ-30K needs {self.count:,}")
        return numbered(items)

    def about(self) -> dict[str, Any]:
        return {
            "convention": f"FID 2048, {self.count:,} against {self.count:,}, bicubic {PICTURES}, centre crop",
            "features": str(self.tools.inception or "inception-2015-12-05"),
        }

    def network(self) -> Inception:
        data = self.tools.data
        return load_inception(self.tools.inception, data.folder / self.name, online=data.online).to(self.tools.device)

    def rows(self, outputs: Sequence[Output]) -> Iterator[tuple[Output, Row]]:
        """Features go into shards beside the journal; a row says that its picture's are there."""
        network = self.network()
        for group in batches(ahead(outputs, read_square), self.tools.batch_size):
            yield from ((output, failed(picture)) for output, picture in group if isinstance(picture, str))
            whole = [(output, picture) for output, picture in group if not isinstance(picture, str)]
            if whole:
                features = featured(network, [picture for _, picture in whole])
                self.keep([output for output, _ in whole], features)
                yield from ((output, {"score": None, "detail": {"shard": whole[0][0].digest}}) for output, _ in whole)

    def keep(self, outputs: Sequence[Output], features: np.ndarray) -> None:
        """A shard of features under the digests of their pictures."""
        folder = self.tools.work / self.name / "features"
        digests = json.dumps([output.digest for output in outputs])
        write_file(
            folder / f"{outputs[0].digest}.safetensors",
            lambda temporary: save_file({"features": features}, temporary, metadata={"digests": digests}),
        )

    def kept(self) -> dict[str, np.ndarray]:
        """Features by the digests of their pictures."""
        features: dict[str, np.ndarray] = {}
        for path in sorted((self.tools.work / self.name / "features").glob("*.safetensors")):
            with safe_open(path, framework="np") as file:
                rows = file.get_tensor("features")
                features |= dict(zip(json.loads(file.metadata()["digests"]), rows, strict=True))
        return features

    def summary(self, rows: Sequence[Row], items: Sequence[Item]) -> Summary:
        return Summary(scores=self.figures(rows), rows=rows, units=[])

    def figures(self, rows: Sequence[Row]) -> dict[str, Any]:
        """FID of each run of `count` rows, a seed's, and their mean."""
        seeds: list[list[Row]] = [list(rows[start : start + self.count]) for start in range(0, len(rows), self.count)]
        if not rows or any(len(each) < self.count or any(row["failure"] for row in each) for each in seeds):
            return {"overall": None, "interval": None}
        known = self.kept()
        lacking = [row["key"] for row in rows if row["digest"] not in known]
        if lacking:
            raise UserError(
                f"{self.tools.work / self.name}: features of {lacking[0]} are gone; remove scores.jsonl there"
            )
        real = self.real()
        values = [
            frechet.distance(real, frechet.moments(np.stack([known[row["digest"]] for row in each]))) for each in seeds
        ]
        return {"overall": float(np.mean([value.fid for value in values])), "interval": None}

    def real(self) -> frechet.Moments:
        """Moments of the published pictures, computed once and kept beside them."""
        archive = self.tools.data.file(self.name, "mjhq30k_imgs.zip")
        stem = "inception-2015-12-05" if self.tools.inception is None else self.tools.inception.stem
        cache = archive.with_name(f"real-{stem}.safetensors")
        if not cache.is_file():
            made = frechet.moments(self.real_features(archive))
            save_file({"mean": made.mean, "covariance": made.covariance, "count": np.array([made.count])}, cache)
        with safe_open(cache, framework="np") as file:
            mean, covariance, count = (file.get_tensor(name) for name in ("mean", "covariance", "count"))
        return frechet.Moments(mean=mean, covariance=covariance, count=int(count[0]))

    def real_features(self, archive: Path) -> np.ndarray:
        network = self.network()
        try:
            with zipfile.ZipFile(archive) as file:
                names = [name for name in file.namelist() if name.lower().endswith((".jpg", ".jpeg", ".png"))]
                if len(names) != self.count:
                    raise UserError(f"{archive}: {len(names)} pictures instead of {self.count:,}")
                size = self.tools.batch_size
                features: list[np.ndarray] = []
                for start in range(0, len(names), size):
                    data = [file.read(name) for name in names[start : start + size]]
                    features.append(featured(network, [square(Image.open(io.BytesIO(each))) for each in data]))
        except zipfile.BadZipFile as error:
            raise UserError(f"{archive}: not a readable archive ({error})") from error
        return np.concatenate(features)


@torch.no_grad()
def featured(network: Inception, pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Features of pictures (H, W, 3) uint8, as one batch."""
    device = next(network.parameters()).device
    return network(stacked(pictures).to(device)).float().cpu().numpy()


def stacked(pictures: Sequence[np.ndarray]) -> Tensor:
    """(B, 3, H, W) uint8."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


class ClipScore(PictureTask):
    """CLIPScore over the first 1,000 captions of the DALL-E 3 list; `00000.png` and so on, in its order."""

    name: str = "clipscore"
    bounds: ClassVar[Bounds] = None
    count: ClassVar[int] = 1000

    def items(self) -> list[Item]:
        path = self.tools.data.file(self.name, "8k_coco.txt")
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        items = [
            Item(id=str(number), prompt=line, files=(f"{number:05d}.png",))
            for number, line in enumerate(lines[: self.count])
        ]
        return numbered(items)

    def about(self) -> dict[str, Any]:
        return {"convention": "CLIPScore: max(mean of 100 cos, 0)", "clip": self.tools.clip}

    def rows(self, outputs: Sequence[Output]) -> Iterator[tuple[Output, Row]]:
        clip = Clip(self.tools.clip, self.tools.device, allow_unpinned=self.tools.data.allow_unpinned)
        for group in batches(ahead(outputs, read), self.tools.batch_size):
            yield from ((output, failed(picture)) for output, picture in group if isinstance(picture, str))
            whole = [(output, picture) for output, picture in group if not isinstance(picture, str)]
            if whole:
                images = clip.images([Image.fromarray(picture) for _, picture in whole]).cpu().numpy()
                texts = clip.texts([output.item.prompt for output, _ in whole]).cpu().numpy()
                cosine = clipscore.cosines(images, texts)
                yield from (
                    (output, {"score": 100 * float(each)}) for (output, _), each in zip(whole, cosine, strict=True)
                )

    def summary(self, rows: Sequence[Row], items: Sequence[Item]) -> Summary:
        summary = super().summary(rows, items)
        cosine = np.array([row["score"] for row in rows if row["score"] is not None]) / 100
        if not len(cosine):
            return summary
        clamped = {"overall": clipscore.mean_then_clamp(cosine), "clamp_then_mean": clipscore.clamp_then_mean(cosine)}
        scores = {**summary.scores, **clamped, "paper_scale": clipscore.paper_scale(cosine)}
        return replace(summary, scores=scores)
